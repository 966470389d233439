"""A teacher that the run serves itself: what it may be, what names it, what it takes."""

import os
import shutil

import dspy
import pytest
import ray

from distill import open_teacher, preflight
from distill.config import RunConfig, TeacherConfig, TraceConfig, TrainConfig
from distill.config_file import load_config
from distill.estimate import describe, estimate
from distill.evaluation.evaluate import teacher_lm
from distill.preflight import Inputs
from distill.programs import Task
from distill.training.base_model import make_scratch
from serve.errors import ConfigurationError
from tests import programs
from tests.tiny_teacher import SIZES

pytestmark = pytest.mark.dspy

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_scratch(folder, [CHAT], SIZES, max_length=64, seed=0)
    return folder


@pytest.fixture
def cluster(monkeypatch):
    """Sets what the cluster is taken to have."""

    def cluster(**resources):
        monkeypatch.setattr(preflight, "capacity", lambda kind: float(resources.get(kind, 0)))

    return cluster


def identity(folder, **settings):
    return teacher_lm({"model": f"ray/{folder}", **settings}).identity


def test_a_folder_beside_the_configuration_is_found_and_an_id_stays(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "run.yaml").write_text(
        "{name: x, program: 'tests.programs:build', teacher: {lm: {model: ray/teacher}},"
        " data: {train: a.csv, test: b.csv, inputs: [text]}}"
    )
    for given, found in (
        ([], f"ray/{tmp_path}/teacher"),
        (["teacher.lm.model=ray/org/model"], "ray/org/model"),
        (["teacher.lm.model=ray/./none"], f"ray/{os.getcwd()}/none"),
    ):
        assert load_config(tmp_path / "run.yaml", given).teacher.lm["model"] == found


def test_it_is_named_by_its_files_and_its_sampling_not_by_its_place(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = identity(folder, temperature=0.5)
    assert identity(copy, temperature=0.5) == first
    assert identity(folder, temperature=0.5, num_retries=9) == first
    assert identity(folder) != first
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(copy, temperature=0.5) != first


def test_its_lm_costs_nothing_and_takes_sampling_settings(folder):
    lm = teacher_lm({"model": f"ray/{folder}", "max_tokens": 9, "temperature": 0.5}).make()
    assert lm.model == f"raydistill/{folder}"
    assert (lm.kwargs["max_tokens"], lm.kwargs["temperature"]) == (9, 0.5)
    assert lm.num_retries == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "ray/"}, "expected ray/ and a Hugging Face id"),
        ({"model": "ray/s3://bucket/model"}, "a folder that all nodes share"),
        ({"model": "ray/scratch"}, "scratch is not trained yet"),
        ({"model": "ray//no/such/folder"}, "/no/such/folder: no such directory"),
        ({"model": "ray/org/model", "temperature": -1}, "teacher.lm: temperature"),
        ({"model": "ray/org/model", "api_base": "http://h"}, "api_base: unknown key"),
    ],
)
def test_what_it_cannot_be_is_said(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        teacher_lm(settings)


def test_a_folder_without_a_model_is_refused_before_anything_starts(folder, tmp_path):
    open_teacher.check({"model": f"ray/{folder}"}, [CHAT[:1]])
    with pytest.raises(ConfigurationError, match=r"teacher\.lm\.model=.* cannot be loaded"):
        open_teacher.check({"model": f"ray/{tmp_path}"}, [])
    assert not ray.is_initialized()


def test_replicas_are_only_for_such_a_teacher():
    with pytest.raises(ValueError, match="num_replicas is for a model that the run serves"):
        TeacherConfig(lm={"model": "openai/gpt-4o-mini"}, num_replicas=2)


def test_it_and_its_actors_share_the_cluster(cluster):
    teacher = TeacherConfig(lm={"model": "ray/org/model"}, num_replicas=1)
    train = TrainConfig(num_workers=1, use_gpu=False)
    cluster(CPU=2)
    assert preflight.fitted_actors(TraceConfig(), teacher).actors == 1
    preflight.check_cluster(train, TraceConfig(actors=1), teacher)
    with pytest.raises(ConfigurationError, match=r"trace\.actors=2 need 3 CPUs together"):
        preflight.check_cluster(train, TraceConfig(actors=2), teacher)
    other = TeacherConfig(lm={"model": "openai/gpt-4o-mini"})
    assert preflight.fitted_actors(TraceConfig(), other).actors == 2
    cluster(CPU=8, GPU=1)
    many = TeacherConfig(lm=teacher.lm, num_replicas=2)
    with pytest.raises(ConfigurationError, match=r"num_replicas=2 needs 2 GPUs"):
        preflight.check_cluster(train, TraceConfig(actors=1), many)


def test_the_estimate_is_free_and_knows_how_much_it_answers_at_once(folder):
    config = RunConfig(
        name="x",
        program="tests.programs:build",
        data={"train": "a.csv", "test": "b.csv", "inputs": ["text"]},
        teacher={"lm": {"model": f"ray/{folder}"}},
        trace={"actors": 4, "concurrency": 100},
    )
    examples = [dspy.Example(text=f"{n}", mood="good").with_inputs("text") for n in range(64)]
    task = Task(programs.build(), dspy.ChatAdapter(), None)
    expected = estimate(Inputs(task, examples, (), (), None), config)
    assert expected.cost_usd == 0
    assert expected.seconds == 64 * 2 / 32
    assert "free of charge" in describe(expected, config)


def test_a_programs_own_lm_cannot_be_one():
    program = programs.TwoSteps()
    program.judge.lm = dspy.LM("ray/org/model")
    with pytest.raises(ConfigurationError, match=r"LM of judge.*raydistill/org/model.*launch"):
        open_teacher.check_none_inside(program)
