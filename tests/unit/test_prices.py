"""What a call took, in tokens and money."""

import pytest

from distill.config import PriceConfig
from distill.tracing.prices import cost_usd, entry_usage, price_of
from distill.tracing.trace import Usage

TABLE = {
    "openai/small": PriceConfig(input=1.0, output=2.0),
    "large": PriceConfig(input=10.0, output=20.0),
}
USAGE = {"prompt_tokens": 1_000_000, "completion_tokens": 500_000}


def entry(model="openai/small", usage=USAGE, cost=9.0):
    return {"model": model, "usage": usage, "cost": cost}


def test_a_price_is_found_with_and_without_the_provider():
    assert price_of("openai/small", TABLE) == PriceConfig(input=1.0, output=2.0)
    assert price_of("azure/large", TABLE) == PriceConfig(input=10.0, output=20.0)
    assert price_of("small", TABLE) is None
    assert price_of("openai/small", None) is None


def test_the_table_goes_before_dspys_own_price():
    assert entry_usage(entry(), TABLE) == Usage(1, 1_000_000, 500_000, 2.0)
    assert entry_usage(entry("openai/other"), TABLE).cost_usd == 9.0
    assert entry_usage(entry(cost=None), None).cost_usd is None


def test_an_unknown_count_has_no_cost():
    assert cost_usd(PriceConfig(input=1.0, output=1.0), None, 3) is None
    assert entry_usage(entry(usage={}), TABLE) == Usage(1, None, None, None)


def test_an_answer_from_dspys_cache_costs_nothing():
    assert entry_usage(entry(usage={}), TABLE, cached=True) == Usage(1, 0, 0, 0.0)
    assert entry_usage(entry(), TABLE, cached=True).cost_usd == pytest.approx(2.0)
