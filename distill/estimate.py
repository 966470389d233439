"""What tracing will take, told from prompts rendered for a sample; no teacher is called."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from distill import datasets, open_teacher, rows
from distill.config import PriceConfig, RunConfig
from distill.evaluation.evaluate import teacher_lm
from distill.preflight import Inputs
from distill.tracing.conductor import CallSettings
from distill.tracing.prices import cost_usd, price_of
from serve.dspy_lm import list_price

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4
SAMPLE = 20
UNKNOWN = "x" * 100
"""Stands for a value that the examples do not hold: of that length it is taken to be."""
SECONDS_PER_CALL = 2.0


@dataclass(frozen=True)
class Estimate:
    """What tracing the whole of the data is expected to take; None is not known.

    Every predictor is taken to be called once a run, so loops and branches are not seen, nor
    are a metric's calls or runs with a hint; a token is taken to be four characters.
    """

    examples: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    seconds: float


def estimate(inputs: Inputs, config: RunConfig) -> Estimate:
    """Estimate what tracing takes."""
    every = list(datasets.distinct([*inputs.train, *inputs.dev, *inputs.test]).values())
    learned = datasets.distinct([*inputs.train, *inputs.dev])
    runs = len(every) + (config.trace.samples - 1) * len(learned)
    sample = every[:: -(-len(every) // SAMPLE)]
    prompts = rows.predictor_prompts(inputs.task.program)
    sizes = [
        _characters(signature, demos, inputs.task.adapter, example)
        for signature, demos in prompts.values()
        for example in sample
    ]
    scale = runs / len(sample) / CHARS_PER_TOKEN
    prompt_tokens = round(scale * sum(prompt for prompt, _ in sizes))
    completion_tokens = round(scale * sum(completion for _, completion in sizes))
    calls = runs * len(prompts)
    price = _price(config)
    return Estimate(
        examples=len(every),
        calls=calls,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=cost_usd(price, prompt_tokens, completion_tokens) if price else None,
        seconds=_seconds(config, calls, prompt_tokens + completion_tokens),
    )


def _characters(
    signature: type[dspy.Signature],
    demos: Sequence[Any],
    adapter: dspy.Adapter,
    example: dspy.Example,
) -> tuple[int, int]:
    """How long a predictor's prompt and its answer are for an example."""
    given = example.toDict()
    values = {name: given.get(name, UNKNOWN) for name in signature.input_fields}
    try:
        prompt = adapter.format(signature, list(demos), values)
    # A type that takes no text: then without the values, whose length is added.
    except Exception as error:
        logger.info("A prompt was estimated, since it cannot be rendered: %s", error)
        text = f"{signature.instructions}{values}{signature.fields}"
        prompt = [{"content": text}]
    answer = {name: given.get(name, UNKNOWN) for name in signature.output_fields}
    written = adapter.format_assistant_message_content(signature, answer)
    return sum(len(str(message["content"])) for message in prompt), len(written)


def _price(config: RunConfig) -> PriceConfig | None:
    lm = teacher_lm(config.teacher.lm).make()
    given = price_of(lm.model, CallSettings.of(config.trace).prices)
    if given:
        return given
    listed = list_price(lm)
    return PriceConfig(input=listed[0], output=listed[1]) if listed else None


def _seconds(config: RunConfig, calls: int, tokens: int) -> float:
    trace = config.trace
    return max(
        calls * SECONDS_PER_CALL / _in_flight(config),
        60 * calls / (trace.requests_per_minute or float("inf")),
        60 * tokens / (trace.tokens_per_minute or float("inf")),
    )


def _in_flight(config: RunConfig) -> int:
    asked = config.trace.max_actors * config.trace.concurrency
    return open_teacher.most_in_flight(config.teacher, asked)


def describe(expected: Estimate, config: RunConfig) -> str:
    """The estimate in words."""
    cost = "its price is not known: give trace.prices"
    if expected.cost_usd is not None:
        cost = f"${expected.cost_usd:,.4f}"
    if open_teacher.is_open(config.teacher.lm) and not expected.cost_usd:
        cost = "free of charge, on this cluster"
    return (
        f"A run would make about {expected.calls:,} teacher calls, with "
        f"{expected.prompt_tokens:,} prompt tokens and {expected.completion_tokens:,} completion "
        f"tokens ({cost}), for {expected.examples:,} examples, in {expected.seconds:,.0f} s if a "
        f"call takes {SECONDS_PER_CALL:g} s and {_in_flight(config)} are in flight."
    )
