"""The ways in which a program is run besides the plain one: samples and hints."""

import asyncio

import dspy
import pytest

from distill.programs import Task
from distill.tracing.trace import UNNAMED, FailureKind
from distill.tracing.tracer import Tracer
from distill.tracing.variants import Variant
from examples.standin_teacher import StandInTeacher, serve_in_background
from tests import programs
from tests.lms import Asked

pytestmark = [
    pytest.mark.dspy,
    # DSPy 3.4 tells whoever calls such an LM that 3.5 will not have it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GOOD = "[[ ## mood ## ]]\ngood\n\n[[ ## completed ## ]]"
EXAMPLE = dspy.Example(text="sun", mood="good").with_inputs("text")


class Asking(dspy.Module):
    """Asks LMs by itself, beside predictors with and without one of their own."""

    def __init__(self, lm):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)
        self.other = dspy.Predict(programs.Sentiment)
        self.other.lm, self.models = lm.copy(), {"by name": [lm.copy()]}

    def forward(self, text):
        self.models["by name"][0](messages=[{"role": "system", "content": "alone"}])
        self.other(text=text)
        return self.judge(text=text)


class OwnAdapter(dspy.Module):
    """Sets an adapter of its own, for all that it asks or for the first half of it."""

    def __init__(self, always):
        super().__init__()
        self.judge, self.always = dspy.Predict(programs.Sentiment), always

    def forward(self, text):
        with dspy.context(adapter=dspy.ChatAdapter()):
            found = self.judge(text=text)
        return found if self.always else self.judge(text=text)


def traced(program, lm, variant):
    tracer = Tracer(Task(program, dspy.ChatAdapter(), None), lm, concurrency=1)
    return asyncio.run(tracer.trace("k", EXAMPLE, variant))


def run(program, lm, variant):
    trace = traced(program, lm, variant)
    assert trace.failure is None, trace.failure
    return trace


def test_every_call_of_a_sample_has_a_temperature_and_only_dspys_own_lm_a_rollout():
    lm = Asked([], temperature=0.0)
    trace = run(Asking(lm), lm, Variant(sample=2))
    assert [call["temperature"] for call in lm.calls] == 3 * [1.0]
    assert not any("rollout_id" in call for call in lm.calls)
    assert trace.sample == 2
    assert trace.usages.keys() == {"judge", "other", UNNAMED}


class Copying(dspy.Module):
    """Asks as DSPy's own BestOfN does: with copies of the LM, each a rollout."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)

    def forward(self, text):
        for number in (1, 2):
            with dspy.context(lm=dspy.settings.lm.copy(rollout_id=number, model="openai/other")):
                self.judge(text=text)
        return self.judge(text=text)


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_a_programs_own_rollouts_stay_apart_in_every_sample(sample):
    with serve_in_background(StandInTeacher(lambda messages: GOOD)) as server:
        asked = []
        given = {"api_base": server.api_base, "api_key": "none", "cache": False}
        lm = dspy.LM("openai/x", temperature=0.0, **given)
        plain = type(lm).forward

        class Watched(dspy.LM):
            def forward(self, prompt=None, messages=None, **kwargs):
                options = {**self.kwargs, **kwargs}
                asked.append((self.model, options.get("rollout_id"), options["temperature"]))
                return plain(self, prompt=prompt, messages=messages, **kwargs)

        lm.__class__ = Watched
        run(Copying(), lm, Variant(sample=sample))
    first, temperature = 1_000_000 * sample, 1.0 if sample else 0.0
    assert asked == [
        ("openai/other", first + 1, temperature),
        ("openai/other", first + 2, temperature),
        ("openai/x", first or None, temperature),
    ]


def test_a_sample_keeps_the_temperature_that_its_lm_has():
    lm = Asked([], temperature=0.3)
    run(programs.build(), lm, Variant(sample=1))
    assert lm.calls[0]["temperature"] == 0.3


def test_the_plain_run_is_asked_as_the_lm_is():
    lm = Asked([], temperature=0.0)
    run(Asking(lm), lm, Variant())
    assert all(call["temperature"] == 0.0 and "rollout_id" not in call for call in lm.calls)


def test_a_hint_tells_every_predictor_the_label_and_nothing_of_the_inputs():
    lm = Asked([])
    program = Asking(lm)
    trace = run(program, lm, Variant(hinted=True))
    told = [call["system"] for call in lm.calls if call["system"] != "alone"]
    assert len(told) == 2
    assert all('{"mood": "good"}' in system and "sun" not in system for system in told)
    assert trace.hinted
    assert "good" not in program.judge.signature.instructions


def test_a_hint_that_nobody_was_told_makes_the_run_a_failure_that_says_so():
    lm = Asked([])
    failed = traced(OwnAdapter(always=True), lm, Variant(hinted=True))
    assert failed.failure.kind is FailureKind.PROGRAM
    assert "told to no predictor" in failed.failure.message
    assert failed.prediction is None
    assert failed.usage.calls == 1
    run(OwnAdapter(always=True), lm, Variant(sample=1))
    run(OwnAdapter(always=False), lm, Variant(hinted=True))
