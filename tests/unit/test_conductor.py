"""Governed LMs: every call of any LM is conducted, timed, tried again and counted."""

import asyncio
import threading
import time

import dspy
import pytest
from dspy.utils.dummies import DummyLM

from distill.config import PriceConfig
from distill.programs import Task
from distill.tracing.conductor import LANE, CallSettings, Conductor
from distill.tracing.gate import Gate, OpenGate
from distill.tracing.governor import Governor
from distill.tracing.permits import Bounds, Stop
from distill.tracing.trace import FailureKind
from distill.tracing.tracer import Tracer
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from serve.dspy_lm import LmFailure, governed
from serve.errors import CallPrevented
from tests import programs

pytestmark = pytest.mark.dspy

MODEL = "openai/stand-in"
PRICES = {MODEL: PriceConfig(input=10.0, output=20.0)}


class Watching(OpenGate):
    """Keeps what it is told."""

    def __init__(self):
        self.asks, self.outcomes, self.left = [], [], []

    def enter(self, ask):
        self.asks.append(ask)
        return super().enter(ask)

    async def aenter(self, ask):
        return self.enter(ask)

    def sent(self, permit):
        self.left.append(permit)

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
    return [outcome.failure for outcome in gate.outcomes]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_may_pass_is_tried_again_and_each_attempt_is_asked_for(calling, asynchronous):
    outputs, gate, usages, errors = calling(Script(500, 429, 503), asynchronous)
    assert outputs == ["an answer of some length"]
    assert ended(gate) == [LmFailure.BROKEN, LmFailure.REFUSED, LmFailure.DOWN, None]
    assert gate.outcomes[1].retry_after_s == 0.01
    assert len(usages) == 1
    assert usages[0].cost_usd > 0
    assert gate.outcomes[-1].cost_usd == usages[0].cost_usd
    assert gate.outcomes[-1].tokens == usages[0].prompt_tokens + usages[0].completion_tokens
    assert not errors


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_key_that_is_refused_is_asked_for_once(calling, asynchronous):
    outputs, gate, _, errors = calling(Script(401, 401), asynchronous)
    assert isinstance(outputs, CallPrevented)
    assert outputs.stop == Stop.HOPELESS
    assert "not now" in str(outputs)
    assert "not now" in gate.outcomes[0].said
    assert ended(gate) == [LmFailure.HOPELESS]
    assert errors == [outputs]


def test_a_request_that_is_wrong_is_not_repeated(calling):
    outputs, gate, _, _ = calling(Script(400, 400))
    assert isinstance(outputs, Exception)
    assert ended(gate) == [LmFailure.OTHER]


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
    assert ended(gate) == [LmFailure.TIMED_OUT, None]


class Dripping:
    """Begins to answer, and goes on with a byte at a time, so that no client's patience ends."""

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(60):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.1)

    app = property(lambda self: self)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_drips_is_given_up_in_time(calling, asynchronous):
    settings = CallSettings(0.5, max_retries=0)
    outputs, gate, _, _ = calling(Dripping(), asynchronous, settings)
    assert isinstance(outputs, TimeoutError)
    assert ended(gate) == [LmFailure.ABANDONED]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_dspys_cache_holds_is_not_paid_again(calling, asynchronous):
    script = Script()
    with serve_in_background(script.app) as server:
        lm = dspy.LM(MODEL, api_base=server.api_base, api_key="none", temperature=0.123)
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
        asyncio.run(lm.acall("hi")) if asynchronous else lm("hi")
        assert script.app.calls == 1
        outputs, _, usages, _ = calling(script, asynchronous, cache=True, temperature=0.123)
    assert outputs == ["an answer of some length"]
    assert usages[0].cost_usd == 0.0
    assert script.app.calls == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_has_left_once_its_call_has_run_for_a_while(calling, monkeypatch, asynchronous):
    monkeypatch.setattr("distill.tracing.conductor.SENT_S", 0.1)
    settings = CallSettings(0.5, max_retries=0)
    assert len(calling(Dripping(), asynchronous, settings)[1].left) == 1
    assert len(calling(Dripping(), asynchronous, settings, n=2)[1].left) == 0
    assert len(calling(Script(), asynchronous)[1].left) == 0


def test_an_event_loop_that_is_held_up_sends_nothing_meanwhile(monkeypatch):
    monkeypatch.setattr("distill.tracing.conductor.SENT_S", 0.01)
    gate, lm = Watching(), governed(dspy.LM(MODEL, cache=False), None)

    async def attempt(timeout_s):
        time.sleep(0.1)
        assert not gate.left
        await asyncio.sleep(0)
        return None, []

    asyncio.run(Conductor(gate, CallSettings(5.0), [].append, [].append).aconduct(lm, 1, attempt))
    assert ended(gate) == [None]


def test_a_call_that_is_cancelled_is_told(monkeypatch):
    gate, lm = Watching(), governed(dspy.LM(MODEL, cache=False), None)
    lm.max_retries = 3

    async def attempt(timeout_s):
        await asyncio.sleep(60)

    conductor = Conductor(gate, CallSettings(5.0), [].append, [].append)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(conductor.aconduct(lm, 1, attempt), 0.05))
    assert ended(gate) == [LmFailure.ABANDONED]


def test_tokens_that_are_not_told_are_unknown_and_not_none_at_all():
    gate, lm = Watching(), governed(dspy.LM(MODEL, cache=False), None)
    conductor = Conductor(gate, CallSettings(5.0), [].append, [].append)
    counted = {"model": MODEL, "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "cost": 0.5}
    for entries in ([counted], [counted, counted], [counted, {"model": MODEL}], []):
        conductor.conduct(lm, 1, lambda timeout_s, entries=entries: (None, entries))
    taken = [(outcome.tokens, outcome.cost_usd) for outcome in gate.outcomes]
    assert taken == [(7, 0.5), (14, 1.0), (None, None), (None, None)]


def test_a_call_whose_usage_cannot_be_read_is_over_all_the_same():
    gate, lm = Watching(), governed(dspy.LM(MODEL, cache=False), None)
    conductor = Conductor(gate, CallSettings(5.0), [].append, [].append)
    told = {"model": MODEL, "usage": {"prompt_tokens": "three", "completion_tokens": 4}}
    with pytest.raises(TypeError):
        conductor.conduct(lm, 1, lambda timeout_s: (None, [told]))
    assert [(outcome.failure, outcome.tokens) for outcome in gate.outcomes] == [(None, None)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_governed_lm_keeps_its_clients_and_its_own_settings():
    lm = Custom(threading.Lock())
    lm.max_retries = 5
    twin = governed(lm, None)
    assert twin.does is lm.does
    assert twin.max_retries == 5
    twin.kwargs["temperature"] = 0.7
    assert "temperature" not in lm.kwargs or lm.kwargs["temperature"] != 0.7


def test_a_choice_is_a_request(calling):
    _, gate, _, _ = calling(Script(), n=3)
    assert [ask.requests for ask in gate.asks] == [3]


@pytest.mark.parametrize("own", [{}, {"timeout": 3}, {"timeout": 60}])
def test_more_calls_in_flight_than_one_client_can_hold_go_through_several(own):
    conductor = Conductor(OpenGate(), CallSettings(5.0), [].append, [].append)
    seen, lm = [], governed(dspy.LM(MODEL, cache=False, **own), None)

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
    assert seen[-1] == min(own.get("timeout", 5.0), 5.0)


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
            except CallPrevented:
                return dspy.Prediction(mood="good")

    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    gate = Gate(Governor(Bounds(budget_usd=1e-9)).exchange)
    with serve_in_background(StandInTeacher(reply)) as server:
        lm = dspy.LM(MODEL, api_base=server.api_base, cache=False)
        trace = traced(Hiding(), lm, gate)
    assert (trace.failure.kind, trace.failure.type) == (FailureKind.PREVENTED, "budget")
    assert trace.usage.calls == 1


def test_a_call_that_nobody_could_be_asked_about_is_not_the_programs_failure():
    def gone(report):
        raise ConnectionError("the governor is gone")

    trace = traced(programs.build(), DummyLM([{"mood": "good"}]), Gate(gone))
    assert (trace.failure.kind, trace.failure.type) == (FailureKind.PREVENTED, "lost")


def test_a_metric_whose_lm_does_not_answer_is_the_teachers_failure(monkeypatch):
    def answer(messages):
        if "no answer for this" in str(messages):
            raise TeacherRefuses(500, "out of order")
        return reply(messages)

    def metric(example, prediction, trace=None):
        return dspy.Predict("question -> verdict")(question="no answer for this").verdict == "good"

    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    with serve_in_background(StandInTeacher(answer)) as server:
        lm = dspy.LM(MODEL, api_base=server.api_base, cache=False, num_retries=0)
        trace = traced(programs.build(), lm, metric=metric)
    assert trace.failure.kind is FailureKind.TEACHER
    assert "out of order" in trace.failure.message
    assert trace.usage.calls == 1


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
