"""Collecting on real Ray actors: durable, resumable, and stopped where it should."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import threading
import time

import dspy
import pytest
import ray

from distill.datasets import example_id
from distill.evaluation.evaluate import teacher_lm
from distill.optimizer import RayBootstrapFinetune
from distill.programs import Task
from distill.tracing import pool
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.governor import governing
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from distill.tracing.trace import Failure, FailureKind, Trace, Usage
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from serve.errors import BudgetExceeded, TraceStoreError, TracingError
from tests import programs
from tests.runs import MoodTeacher, mood_of

pytestmark = [pytest.mark.integration, pytest.mark.dspy]


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    os.environ["OPENAI_API_KEY"] = "not-a-key"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def job(server, folder, texts, program=None, limits=Limits(), **changes):  # noqa: B008
    settings = {"model": "openai/stand-in", "api_base": server.api_base, "num_retries": 0}
    given = {
        "task": Task(program or programs.build(), dspy.ChatAdapter(), None),
        "lm": teacher_lm(settings | changes.pop("lm", {})),
        "examples": [dspy.Example(text=text).with_inputs("text") for text in texts],
        "store": TraceStore(str(folder)),
        "actors": 2,
        "concurrency": 4,
        "limits": limits,
    }
    return Collection(**{**given, **changes})


def ignore(*_):
    pass


TEXTS = [f"sunny day {number}" for number in range(40)]


def test_every_example_is_traced_once_and_a_second_run_makes_no_call(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        seen = []
        collect(job(server, tmp_path, [*TEXTS, *TEXTS]), lambda *args: seen.append(args))
        assert sorted(teacher.asked) == sorted(TEXTS)
        assert seen[-1][0].finished == len(TEXTS) == seen[-1][2]
        again = job(server, tmp_path, TEXTS)
        collect(again, ignore)
        assert teacher.calls == len(TEXTS)
        found = again.store.latest(again.keys())
        assert {trace.prediction["mood"] for trace in found.values()} == {"good"}


def test_a_changed_program_or_teacher_is_traced_anew(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        collect(job(server, tmp_path, TEXTS[:4]), ignore)
        collect(job(server, tmp_path, TEXTS[:4], lm={"temperature": 0.5}), ignore)
        collect(job(server, tmp_path, TEXTS[:4], programs.TwoSteps()), ignore)
        assert teacher.calls == 4 + 4 + 8


def test_a_failing_example_is_recorded_and_skipped(tmp_path):
    texts = [*TEXTS[:19], "boom"]
    with serve_in_background(MoodTeacher()) as server:
        raising = job(server, tmp_path, texts, programs.Raising(), Limits(max_failure_rate=0.2))
        collect(raising, ignore)
        failures = [t.failure for t in raising.store.scan() if t.failure]
    assert [failure.type for failure in failures] == ["ValueError"]


def test_too_many_failures_stop_the_run_with_the_reason(tmp_path):
    texts = [f"boom {number}" for number in range(200)]
    with serve_in_background(MoodTeacher()) as server:
        raising = job(server, tmp_path, texts, programs.Raising(), Limits(max_failure_rate=0.2))
        with pytest.raises(TracingError, match="cannot handle boom") as caught:
            collect(raising, ignore)
    assert "trace.max_failure_rate=0.2" in str(caught.value)
    assert len(list(raising.store.scan())) < len(texts)


def test_a_wrong_key_stops_the_run_at_once(tmp_path):
    def refuse(messages):
        raise TeacherRefuses(401, "Incorrect API key provided")

    teacher = StandInTeacher(refuse)
    with serve_in_background(teacher) as server, pytest.raises(TracingError, match="API key"):
        collect(job(server, tmp_path, [f"{n}" for n in range(500)]), ignore)
    assert teacher.calls <= 2 * 8


def test_what_failed_at_the_teacher_is_asked_again_and_a_programs_error_is_not(tmp_path):
    down = threading.Event()
    down.set()
    mood = MoodTeacher()

    def answer(messages):
        if down.is_set():
            raise TeacherRefuses(500, "out of order")
        return mood._reply(messages)

    with serve_in_background(StandInTeacher(answer)) as server:
        texts = [*TEXTS[:8], "boom"]
        flaky = job(server, tmp_path, texts, programs.Raising())
        collect(flaky, ignore)
        down.clear()
        collect(flaky, ignore)
        assert sorted(mood.asked) == sorted(TEXTS[:8])
        found = flaky.store.latest(flaky.keys())
        assert sum(trace.failure is not None for trace in found.values()) == 1


def test_the_budget_stops_the_run_and_a_larger_one_goes_on(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        priced = {"lm": {"model": "openai/gpt-4o-mini"}}
        probe = job(server, tmp_path / "probe", TEXTS[:1], **priced)
        collect(probe, ignore)
        (trace,) = probe.store.scan()
        assert trace.usage.cost_usd > 0
        budget = Limits(budget_usd=20 * trace.usage.cost_usd)
        with pytest.raises(BudgetExceeded, match="budget_usd"):
            collect(job(server, tmp_path, TEXTS, limits=budget, **priced), ignore)
        assert 18 <= len(teacher.asked) - 1 <= 20
        assert all(trace.spent.calls for trace in TraceStore(str(tmp_path)).scan())
        collect(job(server, tmp_path, TEXTS, **priced), ignore)
        assert sorted(teacher.asked[1:]) == sorted(TEXTS)


def test_what_a_budget_prevented_does_not_make_failures_of_before_look_common(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        again = job(server, tmp_path, TEXTS, limits=Limits(max_failure_rate=0.2))
        records = []
        for number, key in enumerate(again.keys()):
            failure = Failure(FailureKind.PREVENTED, "budget", "spent")
            if number < 10:
                failure = (
                    Failure(FailureKind.PARSE, "AdapterParseError", "?") if not number else None
                )
            usage = Usage(1, 10, 2, 0.1)
            trace = Trace(key, str(number), (), {"mood": "good"}, usage, 0.0, None, failure)
            records.append(trace.to_json())
        again.store.writer().append(records)
        counted = []
        collect(again, lambda counts, *_: counted.append(counts))
    assert len(teacher.asked) == len(TEXTS) - 10
    assert counted[-1].finished == len(TEXTS)


def test_a_governor_that_is_gone_ends_the_run_and_the_next_has_another(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def doomed(run, bounds):
        with governing(run, bounds) as governor:
            ray.kill(governor)
            yield governor

    with serve_in_background(MoodTeacher()) as server:
        limited = job(server, tmp_path, TEXTS, limits=Limits(requests_per_minute=10_000))
        with monkeypatch.context() as patched:
            patched.setattr("distill.tracing.collect.governing", doomed)
            with pytest.raises(TracingError, match="run the same command again"):
                collect(limited, ignore)
        assert not list(limited.store.scan())
        collect(limited, ignore)
        assert len(list(limited.store.scan())) == len(TEXTS)


def test_a_budget_for_a_teacher_without_prices_is_refused(tmp_path):
    with serve_in_background(MoodTeacher()) as server, pytest.raises(TracingError, match="price"):
        collect(job(server, tmp_path, TEXTS, limits=Limits(budget_usd=1.0)), ignore)


class Suicidal(dspy.Module):
    """Kills its own actor, once, in the middle of a run."""

    def __init__(self, marker):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)
        self.marker = marker

    def forward(self, text):
        if text == TEXTS[20] and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.judge(text=text)


def test_an_actor_that_dies_costs_only_what_it_had_in_flight(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        deadly = job(server, tmp_path / "s", TEXTS, Suicidal(str(tmp_path / "died")))
        collect(deadly, ignore)
        assert len(deadly.store.latest(deadly.keys())) == len(TEXTS)
        assert len(teacher.asked) <= len(TEXTS) + deadly.concurrency


def test_a_store_that_cannot_be_written_is_said_before_the_first_call(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    teacher = MoodTeacher()
    with (
        serve_in_background(teacher) as server,
        pytest.raises(TraceStoreError, match="cannot be written"),
    ):
        collect(job(server, blocked / "store", TEXTS[:2]), ignore)
    assert teacher.calls == 0


def test_a_silence_is_told_with_an_example_in_flight(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pool, "STILL_AFTER_S", 0.5)
    with serve_in_background(MoodTeacher(latency_s=4.0)) as server:
        silent = job(server, tmp_path, TEXTS[:2])
        collect(silent, ignore)
    ids = [example_id(example) for example in silent.examples]
    assert any(f"In flight: example {each} and" in caplog.text for each in ids), caplog.text


class Deadly(dspy.Module):
    """Kills its actor each time that it sees one text."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)

    def forward(self, text):
        if text == TEXTS[5]:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.judge(text=text)


def test_an_example_that_kills_its_actor_each_time_is_recorded_as_failed(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        deadly = job(server, tmp_path, TEXTS[:12], Deadly())
        collect(deadly, ignore)
        (failed,) = [trace for trace in deadly.store.scan() if trace.failure]
        assert failed.failure.type == "ActorDied"
        assert len(deadly.store.latest(deadly.keys())) == 12
        before = teacher.calls
        collect(deadly, ignore)
    assert teacher.calls == before


class OnlyHere:
    """Means something to this process and to no other."""

    def __reduce__(self):
        return importlib.import_module, ("only_here",)


def test_what_no_actor_can_import_ends_the_run_at_once(tmp_path):
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        lost = job(server, tmp_path, TEXTS)
        lost = dataclasses.replace(lost, lm=dataclasses.replace(lost.lm, judge=OnlyHere()))
        with pytest.raises(TracingError, match=r"cannot start: .*'only_here'\. Every node needs"):
            collect(lost, ignore)
    assert teacher.calls == 0


def test_the_pool_grows_to_what_fits_and_does_not_wait_for_more(tmp_path):
    teacher = MoodTeacher()
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    with serve_in_background(teacher) as server:
        program = Meeting(str(meeting))
        growing = job(server, tmp_path, TEXTS, program, actors=1, max_actors=8, concurrency=2)
        collect(growing, ignore)
    assert len(list(meeting.iterdir())) == 2  # The cluster has two CPUs.
    assert len(teacher.asked) == len(TEXTS)


class Meeting(dspy.Module):
    """Answers only once it runs in two processes."""

    def __init__(self, folder):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)
        self.folder = folder

    def forward(self, text):
        open(os.path.join(self.folder, str(os.getpid())), "w").close()
        while len(os.listdir(self.folder)) < 2:
            time.sleep(0.05)
        return self.judge(text=text)


def test_samples_are_runs_of_their_own_and_only_the_missing_ones_are_made(tmp_path):
    temperatures = []

    class Recording(MoodTeacher):
        async def _complete(self, request):
            temperatures.append((await request.json()).get("temperature"))
            return await super()._complete(request)

    teacher = Recording()
    with serve_in_background(teacher) as server:
        once = job(server, tmp_path, TEXTS[:5], lm={"temperature": 0.0})
        collect(once, ignore)
        thrice = dataclasses.replace(once, samples=3)
        collect(thrice, ignore)
        traces = list(thrice.traces())
    assert sorted(teacher.asked) == sorted(3 * TEXTS[:5])
    assert [trace.sample for trace in traces] == 5 * [0, 1, 2]
    assert sorted(temperatures) == 5 * [0.0] + 10 * [1.0]


def test_an_example_that_failed_is_run_again_with_the_label_as_a_hint(tmp_path):
    def answer(messages):
        told = "known to end in" in str(messages)
        prompt = read_prompt(messages)
        return prompt.reply({"mood": mood_of(prompt.inputs["text"]) if told else "bad"})

    teacher = StandInTeacher(answer)
    with serve_in_background(teacher) as server:
        labelled = [
            dspy.Example(text=f"day {n} was {word}", mood=mood_of(word)).with_inputs("text")
            for n in range(4)
            for word in ("sunny", "rainy")
        ]
        task = Task(programs.build(), dspy.ChatAdapter(), programs.right_mood)
        hinting = job(server, tmp_path, [], examples=labelled, task=task, hints=True)
        seen = []
        collect(hinting, lambda *args: seen.append(args))
        assert teacher.calls == 8 + 4 == seen[-1][2]
        hinted = [trace for trace in hinting.traces() if trace.hinted]
        assert {trace.prediction["mood"] for trace in hinted} == {"good"}
        assert all(trace.score.value for trace in hinted)
        collect(hinting, ignore)
        assert teacher.calls == 8 + 4


def test_a_teacher_answers_in_its_own_words_only_once_parsed(tmp_path):
    def answer(messages):
        return "no format" if "7" in read_prompt(messages).inputs["text"] else "still none"

    with serve_in_background(StandInTeacher(answer)) as server:
        garbled = job(server, tmp_path, TEXTS[:10])
        collect(garbled, ignore)
        assert {t.failure.kind for t in garbled.store.scan()} == {"parse"}


def test_the_optimizer_takes_samples_keep_hints_and_imports(tmp_path):
    trained = {}

    class TracingOnly(RayBootstrapFinetune):
        @staticmethod
        def finetune_lms(finetune_dict):
            trained.update(finetune_dict)
            return {key: job["lm"] for key, job in finetune_dict.items()}

    log = tmp_path / "log.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    log.write_text(json.dumps({"messages": chat}))
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        lm = dspy.LM("openai/stand-in", api_base=server.api_base, cache=False, num_retries=0)
        optimizer = TracingOnly(
            metric=programs.right_mood,
            student_model="scratch",
            trace={"samples": 2, "keep": "first", "hints": True, "import": [str(log)]},
            storage=str(tmp_path / "runs"),
        )
        trainset = [
            dspy.Example(text=f"sunny {n}", mood="good" if n else "bad").with_inputs("text")
            for n in range(5)
        ]
        with dspy.context(lm=lm):
            optimizer.compile(programs.build(), trainset=trainset)
    (job,) = trained.values()
    assert len(job["train_data"]) == 4 + 1
    assert teacher.calls == 2 * 5 + 1
