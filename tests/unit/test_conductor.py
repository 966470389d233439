"""Governed LMs: every call of any LM is conducted, timed, tried again and counted."""

import asyncio
import time

import dspy
import pytest
from dspy.utils.dummies import DummyLM

from distill.programs import Task
from distill.tracing.conductor import LANE, CallSettings, Conductor
from distill.tracing.gate import Gate, OpenGate
from distill.tracing.governor import Governor
from distill.tracing.permits import Bounds, Ended
from distill.tracing.prices import Price
from distill.tracing.trace import FailureKind
from distill.tracing.tracer import Tracer
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from serve.dspy_lm import governed
from serve.errors import BudgetSpent, CallPrevented, TeacherUnusable
from tests import programs

pytestmark = pytest.mark.dspy

MODEL = "openai/stand-in"
PRICES = {MODEL: Price(10.0, 20.0)}


class Watching(OpenGate):
    """Keeps what it is told."""

    def __init__(self):
        self.asks, self.outcomes = [], []

    def enter(self, ask):
        self.asks.append(ask)
        return super().enter(ask)

    async def aenter(self, ask):
        return self.enter(ask)

    def leave(self, permit, outcome):
        self.outcomes.append(outcome)


class Script:
    """A teacher that goes through a list of statuses, then answers."""

    def __init__(self, *statuses, retry_after=0.01):
        self.statuses, self.retry_after = list(statuses), retry_after
        self.app = StandInTeacher(self.answer)

    def answer(self, messages):
        if self.statuses:
            raise TeacherRefuses(self.statuses.pop(0), "not now", self.retry_after)
        return "an answer of some length"


@pytest.fixture
def calling(monkeypatch):
    """Call a governed LM once, from a thread or on a loop; returns what was seen."""
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    monkeypatch.setattr("distill.tracing.retries.FIRST_WAIT_S", 0.01)

    def call(script, asynchronous=False, settings=None, **options):
        gate, usages, errors = Watching(), [], []
        conductor = Conductor(
            gate, settings or CallSettings(5.0, prices=PRICES), usages.append, errors.append
        )
        with serve_in_background(script.app) as server:
            given = {"api_base": server.api_base, "cache": False, **options}
            lm = governed(dspy.LM(MODEL, **given), conductor)
            try:
                outputs = asyncio.run(lm.acall("hi")) if asynchronous else lm("hi")
            except Exception as error:
                outputs = error
        return outputs, gate, usages, errors

    return call


def ended(gate):
    return [outcome.ended for outcome in gate.outcomes]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_may_pass_is_tried_again_and_each_attempt_is_asked_for(calling, asynchronous):
    outputs, gate, usages, errors = calling(Script(500, 429, 503), asynchronous)
    assert outputs == ["an answer of some length"]
    assert ended(gate) == [Ended.DOWN, Ended.REFUSED, Ended.DOWN, Ended.ANSWERED]
    assert gate.outcomes[1].retry_after_s == 0.01
    assert len(usages) == 1
    assert usages[0].cost_usd > 0
    assert gate.outcomes[-1].cost_usd == usages[0].cost_usd
    assert gate.outcomes[-1].tokens == usages[0].prompt_tokens + usages[0].completion_tokens
    assert not errors


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_key_that_is_refused_is_asked_for_once(calling, asynchronous):
    outputs, gate, _, errors = calling(Script(401, 401), asynchronous)
    assert isinstance(outputs, TeacherUnusable)
    assert "not now" in str(outputs)
    assert ended(gate) == [Ended.HOPELESS]
    assert errors == [outputs]


def test_a_request_that_is_wrong_is_not_repeated(calling):
    outputs, gate, _, _ = calling(Script(400, 400))
    assert isinstance(outputs, Exception)
    assert ended(gate) == [Ended.OTHER]


@pytest.mark.parametrize(
    ("settings", "num_retries", "attempts"),
    [(CallSettings(5.0), 1, 2), (CallSettings(5.0), 0, 1), (CallSettings(5.0, 2), 0, 3)],
)
def test_the_lms_own_number_of_retries_counts_unless_one_is_given(
    calling, settings, num_retries, attempts
):
    outputs, gate, _, _ = calling(Script(*[500] * 9), settings=settings, num_retries=num_retries)
    assert isinstance(outputs, Exception)
    assert len(gate.outcomes) == attempts


class Hanging:
    """Does not answer its first call."""

    def __init__(self):
        self.script, self.hung = Script(), False
        self.app = self

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and not self.hung:
            self.hung = True
            await asyncio.sleep(60)
        await self.script.app(scope, receive, send)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_hangs_is_given_up_in_time_and_tried_again(calling, asynchronous):
    outputs, gate, _, _ = calling(Hanging(), asynchronous, CallSettings(0.5, prices=PRICES))
    assert outputs == ["an answer of some length"]
    assert ended(gate) == [Ended.TIMED_OUT, Ended.ANSWERED]


def test_a_choice_is_a_request(calling):
    _, gate, _, _ = calling(Script(), n=3)
    assert [ask.requests for ask in gate.asks] == [3]


def test_more_calls_in_flight_than_one_client_can_hold_go_through_several():
    conductor = Conductor(OpenGate(), CallSettings(5.0), [].append, [].append)
    seen, lm = [], dspy.LM(MODEL, cache=False)

    async def attempt(timeout_s):
        seen.append(timeout_s)
        await asyncio.sleep(0.05)
        return None, []

    async def calls():
        lm.max_retries = 0
        await asyncio.gather(*(conductor.aconduct(lm, 1, attempt) for _ in range(3 * LANE)))
        await conductor.aconduct(lm, 1, attempt)

    asyncio.run(calls())
    assert {seen.count(timeout_s) for timeout_s in set(seen)} == {LANE, LANE + 1}
    assert len(set(seen)) == 3
    assert seen[-1] == 5.0


def traced(program, lm, gate=None, settings=None, metric=None):
    task = Task(program, dspy.ChatAdapter(), metric)
    example = dspy.Example(text="the sun", mood="good").with_inputs("text")

    async def once():
        calls = settings or CallSettings(5.0, prices=PRICES)
        tracer = Tracer(task, lm, concurrency=2, gate=gate, calls=calls)
        return await tracer.trace("key", example)

    return asyncio.run(once())


def test_copies_and_held_lms_are_governed_as_well():
    class Holding(dspy.Module):
        def __init__(self):
            super().__init__()
            self.judge = dspy.Predict(programs.Sentiment)
            self.spare = DummyLM([{"mood": "good"}] * 3)

        def forward(self, text):
            with dspy.context(lm=self.spare):
                self.judge(text=text)
            with dspy.context(lm=dspy.settings.lm.copy(temperature=0.7)):
                return self.judge.deepcopy()(text=text)

    gate, lm = Watching(), DummyLM([{"mood": "bad"}] * 3)
    trace = traced(Holding(), lm, gate)
    assert trace.failure is None
    assert len(gate.outcomes) == 2 == trace.usages["judge"].calls
    assert lm.history == []


class Custom(dspy.BaseLM):
    """A user's own LM, as DSPy 3.1 and 3.4 both take it."""

    def __init__(self, does):
        super().__init__(model="custom")
        self.does, self.num_retries = does, 0

    def forward(self, prompt=None, messages=None, **kwargs):
        return self.does()


# DSPy 3.4 tells whoever calls such an LM that 3.5 will not have it.
old_lm = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@old_lm
def test_an_lm_of_another_class_is_given_up_in_time():
    trace = traced(programs.build(), Custom(lambda: time.sleep(5)), settings=CallSettings(0.2))
    assert trace.failure.kind is FailureKind.TEACHER
    assert trace.latency_s < 4


@old_lm
def test_a_connection_that_another_lm_lost_is_the_teachers_failure():
    def lose():
        raise ConnectionResetError("gone")

    assert traced(programs.build(), Custom(lose)).failure.kind is FailureKind.TEACHER


def reply(messages):
    prompt = read_prompt(messages)
    return prompt.reply(dict.fromkeys(prompt.outputs, "good"))


def test_a_program_that_hides_a_call_that_was_not_made_has_failed(monkeypatch):
    class Hiding(dspy.Module):
        def __init__(self):
            super().__init__()
            self.judge = dspy.Predict(programs.Sentiment)

        def forward(self, text):
            self.judge(text=text)
            try:
                return self.judge(text=text)
            except BudgetSpent:
                return dspy.Prediction(mood="good")

    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    gate = Gate(Governor(Bounds(budget_usd=1e-9)).exchange)
    with serve_in_background(StandInTeacher(reply)) as server:
        lm = dspy.LM(MODEL, api_base=server.api_base, cache=False)
        trace = traced(Hiding(), lm, gate)
    assert (trace.failure.kind, trace.failure.type) == (FailureKind.TEACHER, "BudgetSpent")
    assert trace.usage.calls == 1


def test_a_call_that_nobody_could_be_asked_about_is_not_the_programs_failure():
    def gone(report):
        raise CallPrevented("the governor is gone")

    trace = traced(programs.build(), DummyLM([{"mood": "good"}]), Gate(gone))
    assert (trace.failure.kind, trace.failure.type) == (FailureKind.TEACHER, "CallPrevented")


def test_histories_turned_off_hide_no_cost(monkeypatch):
    class Quiet(dspy.Module):
        def __init__(self):
            super().__init__()
            self.judge = dspy.Predict(programs.Sentiment)

        def forward(self, text):
            with dspy.context(disable_history=True):
                return self.judge(text=text)

    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    with serve_in_background(StandInTeacher(reply)) as server:
        lm = dspy.LM(MODEL, api_base=server.api_base, cache=False)
        assert traced(Quiet(), lm).usage.cost_usd > 0
