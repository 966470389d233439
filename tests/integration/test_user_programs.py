"""Programs as users write them: clients of their own, threads of their own, keys, custom LMs."""

import asyncio
import dataclasses
import os
import re
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest
import ray

from distill.config import PriceConfig
from distill.evaluation.evaluate import teacher_lm
from distill.programs import Task
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.conductor import CallSettings
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from examples.chat_prompts import read_prompt
from examples.standin_teacher import TeacherRefuses, serve_in_background
from serve.errors import ConfigurationError
from tests import programs
from tests.optimizing import compile_rows, make_lm, only, ours, texts
from tests.runs import MoodTeacher

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

KEY, SEARCH_KEY = "sk-of-the-test-that-nobody-may-find", "another-that-nobody-may-find"


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    os.environ["OPENAI_API_KEY"] = "not-a-key"
    os.environ["SEARCH_API_KEY"] = SEARCH_KEY
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield
    ray.shutdown()
    del os.environ["SEARCH_API_KEY"]


@pytest.fixture
def teacher():
    return MoodTeacher()


@pytest.fixture
def server(teacher):
    with serve_in_background(teacher) as server:
        yield server


def job(server, folder, program, setup=None, number=12, **changes):
    given = {
        "task": Task(program, dspy.ChatAdapter(), None, setup=setup),
        "lm": teacher_lm({"model": "openai/stand-in", "api_base": server.api_base}),
        "examples": texts(*(f"sunny {n}" for n in range(number)), mood="good"),
        "store": TraceStore(str(folder)),
        "actors": 2,
        "concurrency": 4,
        "limits": Limits(max_failure_rate=0.2),
    }
    return Collection(**{**given, **changes})


def ignore(*_):
    pass


def traced(collection):
    collect(collection, ignore)
    return list(collection.traces())


class Client:
    """Cannot be sent to another process; counts how often it is made, in a folder."""

    def __init__(self, folder):
        self.lock = threading.Lock()
        self.made = Path(folder) / f"{os.getpid()}-{id(self)}"
        self.made.touch()

    def upper(self, text):
        with self.lock:
            return f"{text} for {os.getpid()}"


class Index:
    client = None


class Searching(dspy.Module):
    """Asks a client, which it holds at some depth, before it asks its predictor."""

    def __init__(self):
        super().__init__()
        self.index = Index()
        self.judge = dspy.Predict(programs.Sentiment)

    def forward(self, text):
        return self.judge(text=self.index.client.upper(text))


class AsyncSearching(Searching):
    async def aforward(self, text):
        return await self.judge.acall(text=self.index.client.upper(text))


def wrong(example, prediction, trace=None):
    return False


def connecting(folder):
    def connect(program):
        program.index.client = Client(folder)

    return connect


@pytest.mark.parametrize("program", [Searching, AsyncSearching])
def test_a_setup_hook_makes_clients_once_in_each_actor(tmp_path, server, program):
    made = tmp_path / "made"
    made.mkdir()
    # Samples and hints run programs of their own, with the same client.
    several = {"samples": 2, "hints": True}
    task = Task(program(), dspy.ChatAdapter(), wrong, setup=connecting(made))
    traces = traced(job(server, tmp_path / "store", None, task=task, **several))
    assert len(traces) == 3 * 12
    assert not any(trace.failure for trace in traces)
    processes = [path.name.split("-")[0] for path in made.iterdir()]
    assert len(processes) == len(set(processes)) <= 2
    asked = {call.inputs["text"].split()[-1] for trace in traces for call in trace.calls}
    assert asked <= set(processes)


def test_a_hook_may_be_async_and_may_configure_dspy(tmp_path, server):
    async def connect(program):
        await asyncio.sleep(0)
        rm = Client(tmp_path)
        dspy.configure(rm=lambda query, k: [dspy.Example(long_text=rm.upper(query))])

    class Rag(dspy.Module):
        def __init__(self):
            super().__init__()
            self.retrieve = dspy.Retrieve(k=1)
            self.judge = dspy.Predict(programs.Sentiment)

        def forward(self, text):
            return self.judge(text=self.retrieve(text).passages[0])

    traces = traced(job(server, tmp_path / "store", Rag(), connect))
    assert all("for" in trace.calls[0].inputs["text"] for trace in traces)


def no_index_today(program):
    raise FileNotFoundError("/data/index.faiss")


def test_a_hook_that_raises_ends_the_run_before_the_first_call(tmp_path, server, teacher):
    failing = job(server, tmp_path, Searching(), no_index_today, number=200)
    with pytest.raises(ConfigurationError) as caught:
        collect(failing, ignore)
    message = str(caught.value)
    assert "setup: no_index_today(program) raised FileNotFoundError: /data/index.faiss" in message
    assert "test_user_programs.py, line" in message
    assert teacher.calls == 0
    assert not list(failing.store.scan())


def test_the_optimizer_takes_a_lambda_as_its_hook(tmp_path, server):
    student = Searching()
    student.set_lm(make_lm(server))
    made = tmp_path / "made"
    made.mkdir()
    optimizer = ours(tmp_path, setup=lambda program: setattr(program.index, "client", Client(made)))
    jobs = compile_rows(optimizer, student, texts("sunny day", "cold day"))
    assert len(only(jobs)["train_data"]) == 2
    assert only(jobs)["train_data"].profile.program_path is None
    assert student.index.client is None
    assert len(list(made.iterdir())) == 1


def test_the_student_of_a_hook_that_can_be_imported_is_served_with_it(tmp_path, server):
    student = programs.Connected()
    student.set_lm(make_lm(server))
    jobs = compile_rows(ours(tmp_path, setup=programs.connect), student, texts("sunny", "cold"))
    profile = only(jobs)["train_data"].profile
    assert profile.program_path == "tests.programs:Connected"
    assert profile.to_json()["setup"] == "tests.programs:connect"


class Threads(dspy.Module):
    """Asks from a pool that each run makes, a pool that lives on, and a thread."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(programs.Sentiment)
        self.second = dspy.Predict(programs.Sentiment)
        self.third = dspy.Predict(programs.Sentiment)
        self.pool = None

    def forward(self, text):
        found = []
        with ThreadPoolExecutor(2) as pool:
            found += pool.map(lambda part: self.first(text=f"{text} {part}"), "ab")
        found += self.pool.map(lambda part: self.second(text=f"{text} {part}"), "cd")
        thread = threading.Thread(target=lambda: found.append(self.third(text=f"{text} e")))
        thread.start()
        thread.join()
        return dspy.Prediction(moods=[each.mood for each in found])


def open_pool(program):
    program.pool = ThreadPoolExecutor(2)


def test_calls_in_a_programs_own_threads_belong_to_the_example_they_are_for(tmp_path, server):
    for trace in traced(job(server, tmp_path, Threads(), open_pool)):
        assert trace.failure is None
        text = trace.calls[0].inputs["text"][:-2]
        found = sorted((call.predictor, call.inputs["text"]) for call in trace.calls)
        names = ["first", "first", "second", "second", "third"]
        assert found == [(name, f"{text} {end}") for name, end in zip(names, "abcde", strict=True)]
        assert {name: usage.calls for name, usage in trace.usages.items()} == {
            "first": 2,
            "second": 2,
            "third": 1,
        }


class OwnLM(dspy.BaseLM):
    """An LM of the user's own, which asks nobody; it has a key and a state."""

    def __init__(self, token):
        super().__init__(model="own")
        self.token, self.calls_made = token, 0

    def forward(self, prompt=None, messages=None, **kwargs):
        assert self.token == KEY
        self.calls_made += 1
        text = read_prompt(messages).reply({"reply": f"reply {self.calls_made > 0}"})
        message = SimpleNamespace(content=text, tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(choices=[choice], usage={"prompt_tokens": 7}, model=self.model)


# DSPy 3.4 tells whoever calls such an LM that 3.5 will not have it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_predictor_asks_the_teacher_that_it_was_given(tmp_path, server, teacher):
    other = MoodTeacher()
    with serve_in_background(other) as others:
        program = programs.TwoSteps()
        program.judge.lm, program.answer.lm = make_lm(others), OwnLM(KEY)
        traces = traced(job(server, tmp_path, program))
    assert (other.calls, teacher.calls) == (12, 0)
    for trace in traces:
        assert trace.prediction == {"mood": "good", "reply": "reply True"}
        assert trace.usages["answer"].prompt_tokens == 7


class Search:
    """A retriever with a key among its attributes."""

    def __init__(self, api_key):
        self.api_key = api_key

    def __call__(self, text):
        assert self.api_key == os.environ["SEARCH_API_KEY"]
        return text


class Searcher(dspy.Module):
    def __init__(self, lm):
        super().__init__()
        self.search = Search(os.environ["SEARCH_API_KEY"])
        self.judge = dspy.Predict(programs.Sentiment)
        self.judge.lm = lm

    def forward(self, text):
        return self.judge(text=self.search(text))


class Checking(MoodTeacher):
    """Keeps the keys that it is sent, and quotes one where it refuses."""

    def __init__(self):
        super().__init__()
        self.keys = set()

    async def _complete(self, request):
        self.keys.add(request.headers["authorization"].removeprefix("Bearer "))
        return await super()._complete(request)

    def _reply(self, messages):
        if "refuse" in str(messages):
            raise TeacherRefuses(400, f"{max(self.keys)} may not ask this")
        return super()._reply(messages)


def test_api_keys_reach_actors_and_are_in_no_pickle_log_or_store(tmp_path):
    teacher = Checking()
    with serve_in_background(teacher) as server:
        lm = make_lm(server, api_key=KEY)
        payload = Task(Searcher(lm), dspy.ChatAdapter(), None).dumps()
        assert not any(key.encode() in payload for key in (KEY, SEARCH_KEY))
        examples = texts("sunny", "grey", "refuse this")
        jobs = compile_rows(ours(tmp_path), Searcher(lm), examples)
    assert teacher.keys == {KEY}
    assert len(only(jobs)["train_data"]) == 2
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for folder in (tmp_path, session) for path in folder.rglob("*")]
    kept = {path: path.read_bytes() for path in files if path.is_file()}
    assert any(b"*** may not ask this" in content for content in kept.values())
    for path, content in kept.items():
        assert not any(key.encode() in content for key in (KEY, SEARCH_KEY)), path


def metrics(run):
    """The values of a run's metrics, as Prometheus reads them, by name and tags."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    found = Counter()
    for line in lines:
        name, _, rest = line.partition("{")
        if name.startswith("ray_raydistill_trace_") and f'run="{run}"' in rest:
            tags = re.findall(r'(predictor|kind|reason)="([^"]*)"', rest)
            found[(name.removeprefix("ray_raydistill_trace_"), *dict(sorted(tags)).values())] = (
                float(rest.rpartition(" ")[2])
            )
    return found


def test_prometheus_reads_what_the_run_counts(tmp_path):
    teacher = MoodTeacher(latency_s=3.0)
    labelled = texts("sunny 1", "sunny 2", "grey 1", mood="good") + texts("boom")
    program = programs.Raising()
    given = {"examples": labelled, "task": Task(program, dspy.ChatAdapter(), programs.right_mood)}
    prices = CallSettings(prices={"openai/stand-in": PriceConfig(input=10.0, output=20.0)})
    counted, in_flight = [], []

    def on_progress(counts, calls, total):
        counted.append((counts, calls))
        in_flight.append(metrics("counted")["in_flight",])

    with serve_in_background(teacher) as server:
        counting = job(server, tmp_path, None, **given, run="counted", calls=prices)
        collect(dataclasses.replace(counting, limits=Limits()), on_progress)
    counts, calls = counted[-1]
    assert 0 < max(in_flight) <= 4
    spending = counting.spending()
    assert len(list(counting.records(spending))) == 4
    usage = spending.by_predictor["judge"]
    expected = {
        ("examples_total",): 4,
        ("calls_total", "judge"): calls,
        ("tokens_total", "prompt", "judge"): usage.prompt_tokens,
        ("tokens_total", "completion", "judge"): usage.completion_tokens,
        ("cost_usd_total", "judge"): pytest.approx(counts.cost_usd),
        ("rejections_total", "metric"): 1,
        ("rejections_total", "error"): 1,
        ("in_flight",): 0,
    }
    # Ray exports each metric in its own time, seconds after it was set.
    deadline = time.monotonic() + 60
    while (found := metrics("counted")) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found == expected
    assert calls == teacher.calls == 3
