"""The estimate of check: calls, tokens, cost and time, from rendered prompts alone."""

import dspy
import pytest

from distill.config import RunConfig
from distill.estimate import describe, estimate
from distill.preflight import Inputs
from distill.programs import Task
from tests import programs

pytestmark = pytest.mark.dspy


def examples(start, stop):
    return [
        dspy.Example(text=f"day {n} was sunny", mood="good").with_inputs("text")
        for n in range(start, stop)
    ]


def config(model="openai/unheard-of", **trace):
    return RunConfig(
        name="x",
        program="tests.programs:build_two_steps",
        data={"train": "a.csv", "test": "b.csv", "inputs": ["text"]},
        teacher={"lm": {"model": model}},
        trace={"actors": 2, "concurrency": 5, **trace},
    )


@pytest.fixture
def inputs():
    task = Task(programs.TwoSteps(), dspy.ChatAdapter(), None)
    return Inputs(task, examples(0, 80), examples(80, 90), examples(90, 100), None)


def test_every_example_is_one_call_of_each_predictor(inputs):
    expected = estimate(inputs, config())
    assert (expected.examples, expected.calls) == (100, 200)
    assert 100 < expected.prompt_tokens / expected.calls < 1000
    assert 5 < expected.completion_tokens / expected.calls < 100


def test_the_cost_is_by_the_given_price_or_dspys_or_not_known(inputs):
    given = {"prices": {"unheard-of": {"input": 1.0, "output": 10.0}}}
    expected = estimate(inputs, config(**given))
    tokens = expected.prompt_tokens + 10 * expected.completion_tokens
    assert expected.cost_usd == pytest.approx(tokens / 1e6)
    assert estimate(inputs, config("openai/gpt-4o-mini")).cost_usd > 0
    unknown = estimate(inputs, config())
    assert unknown.cost_usd is None
    assert "trace.prices" in describe(unknown, config())


def test_the_time_is_that_of_the_narrowest_limit(inputs):
    assert estimate(inputs, config()).seconds == 200 * 2 / 10
    assert estimate(inputs, config(requests_per_minute=20)).seconds == 600
    slow = estimate(inputs, config(tokens_per_minute=1000))
    assert slow.seconds == (slow.prompt_tokens + slow.completion_tokens) * 0.06


def test_samples_are_runs_of_what_is_learned_from_and_all_actors_are_counted(inputs):
    expected = estimate(inputs, config(samples=3, actors={"min": 1, "max": 4}))
    assert (expected.examples, expected.calls) == (100, 2 * (100 + 2 * 90))
    assert expected.seconds == expected.calls * 2 / 20
