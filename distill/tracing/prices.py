"""What a call took: tokens as the provider counted them, money by a price table."""

from collections.abc import Mapping
from typing import Any

from distill.config import PriceConfig
from distill.tracing.trace import Usage
from serve.dspy_lm import call_usage

PER = 1e6

Prices = Mapping[str, PriceConfig]
"""By model, as ``dspy.LM`` is given it, or without the provider before the slash."""


def price_of(model: str, prices: Prices | None) -> PriceConfig | None:
    """The price that a table names for a model."""
    if not prices:
        return None
    return prices.get(model) or prices.get(model.partition("/")[2])


def cost_usd(
    price: PriceConfig, prompt_tokens: int | None, completion_tokens: int | None
) -> float | None:
    """The cost of so many tokens; None where they are not known."""
    if prompt_tokens is None or completion_tokens is None:
        return None
    return (prompt_tokens * price.input + completion_tokens * price.output) / PER


def entry_usage(entry: Mapping[str, Any], prices: Prices | None, cached: bool = False) -> Usage:
    """What one call took.

    Args:
        entry: What DSPy recorded of it.
        prices: Prices that go before DSPy's own.
        cached: Whether DSPy may have answered it from its cache, which reports no usage.
    """
    if cached and not entry.get("usage"):
        return Usage(1, 0, 0, 0.0)
    prompt_tokens, completion_tokens, cost = call_usage(dict(entry))
    price = price_of(entry["model"], prices)
    if price is not None:
        cost = cost_usd(price, prompt_tokens, completion_tokens)
    return Usage(1, prompt_tokens, completion_tokens, cost)
