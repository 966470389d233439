"""An open-weight teacher is served while it is asked, answers like any other, and is gone after."""

import os
import shutil
import subprocess
import sys

import dspy
import pytest
import ray
import ray.serve

from distill import open_teacher
from distill.config import TeacherConfig
from distill.evaluation.evaluate import student_lm, teacher_lm
from distill.programs import Task
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from distill.tracing.trace import METRIC
from serve import running, temporary
from serve.deployments import Scale
from serve.errors import StudentError
from serve.handles import JOB_APP_PREFIX, job_app_name
from tests import programs
from tests.runs import BAD, GOOD, ROOT, RunFolder, environment, mood_of
from tests.tiny_teacher import make_teacher

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

TEXTS = [f"day {3 * number} was {word}" for number, word in enumerate((*GOOD, *BAD))]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def said():
    return []


@pytest.fixture
def job(teacher_dir, tmp_path, said):
    """Makes jobs that ask the served teacher."""

    def job(metric=programs.right_mood, model=teacher_dir, **changes):
        settings = {"model": f"ray/{model}", "max_tokens": 40}
        examples = [
            dspy.Example(text=text, mood=mood_of(text)).with_inputs("text") for text in TEXTS
        ]
        given = {
            "task": Task(programs.build(), dspy.ChatAdapter(), metric),
            "lm": teacher_lm(settings),
            "examples": examples,
            "store": TraceStore(str(tmp_path / "traces")),
            "actors": 1,
            "concurrency": 4,
            "limits": Limits(budget_usd=1.0),
            "service": open_teacher.service(TeacherConfig(lm=settings), said.append),
        }
        return Collection(**{**given, **changes})

    return job


def ignore(*_):
    pass


def asking_metric(example, prediction, trace=None):
    return dspy.Predict(programs.Sentiment)(text=example.text).mood == prediction.mood


def test_it_is_served_while_there_is_work_and_gone_after(job, said):
    first = job(samples=2)
    collect(first, ignore)
    spending = first.spending()
    traces = list(first.traces(spending))
    assert len(traces) == 2 * len(TEXTS)
    right = [trace for trace in traces if trace.score and trace.score.value]
    assert len(right) > len(TEXTS)
    paid = spending.by_predictor["self"]
    assert paid.cost_usd == 0
    assert paid.prompt_tokens > 0
    assert "answers" in said[-1]
    assert not running.is_serving()
    said.clear()
    collect(first, ignore)
    assert not said


def test_a_metric_that_asks_it_has_it_served(job, said, teacher_dir):
    teacher = job().lm
    student = student_lm(str(teacher_dir), "it", 0, teacher)
    quiet = job(lm=student)
    collect(quiet, ignore)
    assert not said
    judged = job(asking_metric, lm=student, store=TraceStore(f"{quiet.store.uri}-judged"))
    collect(judged, ignore)
    assert "answers" in said[-1]
    traces = list(judged.traces())
    assert [trace.score.value for trace in traces] == len(TEXTS) * [1.0]
    assert all(METRIC in trace.usages for trace in traces)
    assert not running.is_serving()


def test_a_changed_metric_that_asks_it_has_it_served_as_well(job, said):
    collect(job(), ignore)
    said.clear()
    traces = list(job(asking_metric).traces())
    assert [trace.score.value for trace in traces] == len(TEXTS) * [1.0]
    assert "answers" in said[-1]
    assert not running.is_serving()


def test_a_model_that_does_not_load_is_told_with_its_cause(job, teacher_dir, tmp_path):
    broken = shutil.copytree(teacher_dir, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(StudentError, match="cannot be loaded as a model"):
        collect(job(model=broken), ignore)
    assert not running.is_serving()


def test_what_ended_jobs_left_is_taken_down_and_nothing_else(teacher_dir):
    ray.serve.start(proxy_location="Disabled")
    leftover, other = f"{JOB_APP_PREFIX}00ffff00-0", "other"
    for name in (leftover, other):
        app = ray.serve.deployment(lambda: "hi", ray_actor_options={"num_cpus": 0}).bind()
        ray.serve.run(app, name=name, route_prefix=None)
    with temporary.served(str(teacher_dir), Scale()):
        ours = job_app_name(str(teacher_dir))
        assert set(ray.serve.status().applications) == {other, ours}
        temporary.sweep()
        assert set(ray.serve.status().applications) == {other, ours}
    assert set(ray.serve.status().applications) == {other}
    ray.serve.shutdown()


ELSEWHERE = """
from contextlib import ExitStack
from serve import running

with ExitStack() as started:
    running.connect(started)
    running.start_serve(started, "Disabled")
"""


def test_who_has_not_started_the_cluster_does_not_stop_serve_under_others():
    variables = {
        **environment(),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        # A Ray that was started by ray.init() asks for its token.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
    }
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=ROOT, env=variables, check=True)
    assert running.is_serving()
    ray.serve.shutdown()


def test_the_commands_take_it_from_beside_the_file(tmp_path, teacher_dir):
    shutil.copytree(teacher_dir, tmp_path / "teacher")
    lm = {"model": "ray/teacher", "max_tokens": 40}
    folder = RunFolder(tmp_path, "", {"teacher": {"lm": lm}})
    traced = folder.raydistill("trace")
    assert traced.returncode == 0, traced.stdout
    assert "60 ok, 0 failed, 60 calls" in traced.stdout
    assert "Starting" in traced.stdout
