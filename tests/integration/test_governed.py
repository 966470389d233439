"""Tracing against a teacher that misbehaves: every example accounted for, no limit passed."""

import asyncio
import contextlib
import os
import random
import threading
import time
from collections import Counter

import dspy
import pytest
import ray

from distill.config import PriceConfig
from distill.datasets import example_id
from distill.evaluation.evaluate import teacher_lm
from distill.programs import Task
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.conductor import CallSettings
from distill.tracing.governor import gate_when_asked
from distill.tracing.limits import Limits
from distill.tracing.permits import Ask, Bounds, Refusal, Stop
from distill.tracing.store import TraceStore
from distill.tracing.trace import METRIC
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from serve.errors import BudgetExceeded, CallPrevented, TracingError
from tests import programs
from tests.runs import MoodTeacher, RunFolder

pytestmark = pytest.mark.integration

MODEL = "openai/stand-in"
PRICES = {MODEL: PriceConfig(input=10.0, output=20.0)}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    os.environ["OPENAI_API_KEY"] = "not-a-key"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Moody(MoodTeacher):
    """Fails in all the ways that teachers do; keeps when it was asked and what it said."""

    def __init__(self, latency_s=0.02, failing=0.0, garbled=0.0, hanging=0.0, capacity=None):
        super().__init__(latency_s)
        self.failing, self.garbled, self.hanging = failing, garbled, hanging
        self.capacity, self.in_flight, self.most_in_flight = capacity, 0, 0
        self.times, self.said, self._draw = [], Counter(), random.Random(0)
        self.closed_until = 0.0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        self.times.append(time.monotonic())
        if self._draw.random() < self.hanging:
            self.said["hang"] += 1
            await asyncio.sleep(3600)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _reply(self, messages):
        now = time.monotonic()
        if self.capacity and self.in_flight > self.capacity and now > self.closed_until:
            self.closed_until = now + 1.0
        if now < self.closed_until:
            self.said[429] += 1
            raise TeacherRefuses(429, "slow down", retry_after=1)
        draw = self._draw.random()
        if draw < self.failing:
            self.said[500] += 1
            raise TeacherRefuses(500, "out of order")
        reply = super()._reply(messages)
        self.said["reply"] += 1
        return "I would rather not say." if draw < self.failing + self.garbled else reply


def job(server, folder, number, program=None, metric=None, **changes):
    settings = {"model": MODEL, "api_base": server.api_base}
    given = {
        "task": Task(program or programs.build(), dspy.ChatAdapter(), metric),
        "lm": teacher_lm(settings),
        "examples": [dspy.Example(text=f"sunny {n}").with_inputs("text") for n in range(number)],
        "store": TraceStore(str(folder)),
        "actors": 2,
        "concurrency": 16,
        "limits": Limits(),
        "calls": CallSettings(prices=PRICES),
    }
    return Collection(**{**given, **changes})


def ignore(*_):
    pass


def paid_for(collection):
    spending = collection.spending()
    for _ in collection.records(spending):
        pass
    return spending


def traces_of(collection):
    return list(collection.store.latest(collection.keys()).values())


def test_every_example_is_accounted_for_whatever_the_teacher_does(tmp_path):
    teacher = Moody(failing=0.05, garbled=0.05, hanging=0.01, capacity=24)
    with serve_in_background(teacher) as server:
        moody = job(server, tmp_path, 400, calls=CallSettings(timeout_s=3.0, prices=PRICES))
        counted = []
        collect(moody, lambda counts, *_: counted.append(counts))
    traces = traces_of(moody)
    assert len(traces) == 400 == counted[-1].finished
    failures = Counter(trace.failure.type for trace in traces if trace.failure)
    assert set(failures) <= {"AdapterParseError"}
    assert failures["AdapterParseError"] < 20
    assert teacher.said["hang"] > 0 < teacher.said[500]
    assert sum(trace.usage.calls for trace in traces) == teacher.said["reply"]


def test_an_outage_is_waited_out_without_losing_an_example(tmp_path):
    teacher = Moody()

    def fail_for_a_while():
        while len(teacher.times) < 20:
            time.sleep(0.01)
        teacher.failing = 1.0
        time.sleep(6)
        teacher.failing = 0.0

    with serve_in_background(teacher) as server:
        threading.Thread(target=fail_for_a_while, daemon=True).start()
        interrupted = job(server, tmp_path, 200, concurrency=8)
        collect(interrupted, ignore)
    assert len(traces_of(interrupted)) == 200
    assert not any(trace.failure for trace in traces_of(interrupted))
    assert teacher.said[500] < 16 * 4


def test_the_budget_is_passed_by_no_more_than_the_calls_in_flight(tmp_path):
    teacher = Moody(latency_s=0.2)
    with serve_in_background(teacher) as server:
        probe = job(server, tmp_path / "probe", 1, programs.TwoSteps())
        collect(probe, ignore)
        cost = traces_of(probe)[0].usage.cost_usd
        assert cost > 0
        teacher.said.clear()
        bounded = job(
            server, tmp_path, 100, programs.TwoSteps(), limits=Limits(budget_usd=20 * cost)
        )
        with pytest.raises(BudgetExceeded, match="budget_usd"):
            collect(bounded, ignore)
        spent = sum(trace.spent.cost_usd or 0.0 for trace in bounded.store.scan())
        # Of several calls at once; each costs the same, so the budget is not passed at all.
        assert teacher.most_in_flight > 8
        assert spent <= 20 * cost + cost / 2
        assert teacher.said["reply"] <= 2 * 20 + 1
        assert spent > 15 * cost
        collect(job(server, tmp_path, 100, programs.TwoSteps()), ignore)
        done = [trace for trace in traces_of(bounded) if not trace.failure]
        assert len(done) == 100


class Wordy(Moody):
    """Says ever more, so that each call costs more than those before it."""

    def _reply(self, messages):
        return f"{'word ' * 10 * self.said['reply']}\n{super()._reply(messages)}"


def test_calls_that_cost_more_than_any_before_pass_the_budget_by_their_own_cost(tmp_path):
    teacher = Wordy(latency_s=0.2)
    with serve_in_background(teacher) as server:
        limits = Limits(budget_usd=0.1)
        bounded = job(server, tmp_path, 400, limits=limits)
        with pytest.raises(BudgetExceeded, match="budget_usd"):
            collect(bounded, ignore)
    costs = [trace.spent.cost_usd or 0.0 for trace in bounded.store.scan()]
    in_flight = teacher.most_in_flight
    assert 8 < in_flight <= bounded.actors * bounded.concurrency
    assert sum(costs) <= limits.budget_usd + in_flight * max(costs)
    assert max(costs) > 3 * min(filter(None, costs))
    assert sum(cost > 0 for cost in costs) == teacher.said["reply"] < 400


def test_the_command_stops_at_the_budget_with_code_3_and_goes_on_with_more(tmp_path):
    teacher = Moody()
    prices = {"prices": {MODEL: {"input": 10.0, "output": 20.0}}}
    with serve_in_background(teacher) as server:
        folder = RunFolder(tmp_path, server.api_base, {"trace": {"concurrency": 4, **prices}})
        stopped = folder.raydistill("trace", "trace.budget_usd=0.05")
        assert stopped.returncode == 3, stopped.stdout
        assert "trace.budget_usd=0.05" in stopped.stdout
        replies = teacher.said["reply"]
        assert 0 < replies < 60
        finished = folder.raydistill("trace", "trace.budget_usd=5")
        assert finished.returncode == 0, finished.stdout
        assert teacher.said["reply"] == 60


def test_a_model_that_is_not_there_stops_the_run_at_once(tmp_path):
    def refuse(messages):
        raise TeacherRefuses(404, "no such model")

    teacher = StandInTeacher(refuse)
    with serve_in_background(teacher) as server, pytest.raises(TracingError, match="no such model"):
        collect(job(server, tmp_path, 500), ignore)
    assert teacher.calls <= 2 * 32


def asking_metric(example, prediction, trace=None):
    return dspy.Predict(programs.Sentiment)(text=example.text).mood == prediction.mood


def other_asking_metric(example, prediction, trace=None):
    return dspy.Predict(programs.Sentiment)(text=example.text).mood != prediction.mood


def test_usage_is_told_by_predictor_and_a_metrics_calls_are_counted(tmp_path):
    teacher = Moody()
    with serve_in_background(teacher) as server:
        judged = job(server, tmp_path, 4, programs.TwoSteps(), asking_metric)
        counted = []
        collect(judged, lambda counts, calls, total: counted.append((counts, calls)))
    for trace in traces_of(judged):
        assert {name: usage.calls for name, usage in trace.usages.items()} == {
            "judge": 1,
            "answer": 1,
            METRIC: 1,
        }
        assert trace.usage.calls == 2
        assert trace.spent.calls == 3
        assert trace.score.value == 1.0
    counts, calls = counted[-1]
    assert calls == teacher.said["reply"] == 12
    assert counts.cost_usd == pytest.approx(sum(t.spent.cost_usd for t in traces_of(judged)))


def test_a_changed_metric_that_asks_an_lm_is_held_to_the_budget_as_well(tmp_path):
    teacher = Moody()
    with serve_in_background(teacher) as server:
        plain = job(server, tmp_path, 6)
        collect(plain, ignore)
        limits = Limits(budget_usd=paid_for(plain).cost_usd)
        with pytest.raises(BudgetExceeded, match="The metric asks an LM"):
            list(job(server, tmp_path, 6, metric=asking_metric, limits=limits).traces())
        assert teacher.said["reply"] == 6
        judged = job(server, tmp_path, 6, metric=asking_metric)
        for _ in range(2):
            assert [trace.score.value for trace in judged.traces()] == 6 * [1.0]
        assert teacher.said["reply"] == 12
        assert paid_for(judged).by_predictor[METRIC].calls == 6
        # What judges cost counts against the budget of the next one.
        limits = Limits(budget_usd=paid_for(judged).cost_usd)
        with pytest.raises(BudgetExceeded, match="The metric asks an LM"):
            list(job(server, tmp_path, 6, metric=other_asking_metric, limits=limits).traces())
        again = list(job(server, tmp_path, 6, metric=asking_metric, limits=limits).traces())
        assert [trace.score.value for trace in again] == 6 * [1.0]
    assert teacher.said["reply"] == 12


def test_a_changed_metric_asks_its_lm_several_times_at_once_and_keeps_the_order(tmp_path):
    teacher = Moody(latency_s=0.1)
    with serve_in_background(teacher) as server:
        collect(job(server, tmp_path, 40), ignore)
        teacher.most_in_flight = 0
        judged = job(server, tmp_path, 40, metric=asking_metric)
        ids = [trace.example_id for trace in judged.traces()]
    assert ids == [example_id(example) for example in judged.examples]
    assert 4 < teacher.most_in_flight <= judged.concurrency


def test_what_judges_have_said_is_kept_when_the_budget_stops_them(tmp_path):
    teacher = Moody(latency_s=0.05)
    with serve_in_background(teacher) as server:
        plain = job(server, tmp_path, 40)
        collect(plain, ignore)
        limits = Limits(budget_usd=1.5 * paid_for(plain).cost_usd)
        with pytest.raises(BudgetExceeded, match="The metric asks an LM"):
            list(job(server, tmp_path, 40, metric=asking_metric, limits=limits).traces())
        assert 40 < teacher.said["reply"] < 80
        assert paid_for(plain).by_predictor[METRIC].calls == teacher.said["reply"] - 40
        assert len(list(job(server, tmp_path, 40, metric=asking_metric).traces())) == 40
    assert teacher.said["reply"] == 80


def test_what_is_still_being_started_when_nobody_wants_it_any_more_is_stopped():
    begun, up, stopped = threading.Event(), threading.Event(), []

    @contextlib.contextmanager
    def serving():
        begun.set()
        up.wait()
        yield
        stopped.append(True)

    with gate_when_asked("run", Bounds, serving) as gate:

        def ask():
            with pytest.raises(CallPrevented, match="Nobody waits"):
                gate.enter(Ask("m"))

        asking = threading.Thread(target=ask)
        asking.start()
        begun.wait()
        gate.close(Refusal(Stop.LOST, "Nobody waits."))
        asking.join()
        threading.Timer(0.5, up.set).start()
    assert stopped


def test_samples_and_hints_are_let_through_and_paid_like_all_else(tmp_path):
    teacher = Moody(capacity=8)
    examples = [dspy.Example(text=f"sunny {n}", mood="bad").with_inputs("text") for n in range(30)]
    with serve_in_background(teacher) as server:
        changes = {"examples": examples, "metric": programs.right_mood, "samples": 2, "hints": True}
        several = job(server, tmp_path, 0, **changes)
        collect(several, ignore)
    traces = list(several.traces())
    assert len(traces) == 3 * 30
    assert sum(trace.hinted for trace in traces) == 30
    paid = paid_for(several).by_predictor["self"]
    assert paid.calls == teacher.said["reply"] == 90
    assert paid.cost_usd > 0
