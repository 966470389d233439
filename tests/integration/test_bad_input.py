"""Bad input: exit code 2, a helpful message, no traceback, and no teacher call."""

import pytest

from examples.standin_teacher import serve_in_background
from tests.runs import MoodTeacher, RunFolder

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def teacher():
    app = MoodTeacher()
    with serve_in_background(app) as server:
        yield app, server


@pytest.fixture
def folder(tmp_path, teacher):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("text,mood\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "base").mkdir()
    return RunFolder(tmp_path, teacher[1].api_base)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trian.num_workers=2", "did you mean train?"),
        ("train.num_worker=2", "did you mean num_workers?"),
        ("train.num_workers=two", "train.num_workers"),
        ("trace.budget_usd=-5", "trace.budget_usd"),
        ("data.inputs=text", "data.inputs"),
        ("data.train={}/none.csv", "no such file"),
        ("data.test={}/empty.csv", "is empty"),
        ("data.train={}/header.csv", "holds no examples"),
        ("data.train={}/binary.csv", "is not UTF-8 text"),
        ("data.train={}", "unknown kind of file"),
        ("data.inputs=[body]", "data.inputs names 'body'"),
        ("data.columns={{nope: text}}", "renames 'nope'"),
        ("data.inputs=[text, mood]", "does not fit the program"),
        ("program=no.such.module:build", "cannot import no.such.module"),
        ("program=tests.programs:nope", "has no 'nope'"),
        ("program=tests.programs:build_unpicklable", "program.lock: _thread.lock"),
        ("metric=tests.programs:not_callable", "expected a function"),
        ("student.model={}/base", "cannot be loaded"),
        ("teacher.lm.api_key=sk-secret", "environment"),
        ("teacher.lm.num_retries=-1", "not what dspy.LM takes"),
        ("storage=nope://bucket", "storage"),
        ("storage=/sys/kernel", "storage: /sys/kernel/tiny cannot be written"),
        ("train.num_workers=4096", "needs 4096 CPUs; the cluster has"),
    ],
)
def test_it_is_refused_before_the_first_call(folder, teacher, override, said):
    finished = folder.raydistill("run", override.format(folder.path))
    assert finished.returncode == 2, finished.stdout
    assert said in finished.stdout
    assert "Traceback" not in finished.stdout
    assert "sk-secret" not in finished.stdout
    assert len(finished.stdout.strip().splitlines()) <= 4, finished.stdout
    assert teacher[0].calls == 0


def test_a_missing_configuration_file_is_named(folder, tmp_path):
    (tmp_path / "config.yaml").unlink()
    finished = folder.raydistill("run")
    assert finished.returncode == 2
    assert "no such configuration file" in finished.stdout


def test_serving_a_folder_without_a_student_is_refused(folder):
    import subprocess

    from tests.runs import ROOT, environment

    finished = subprocess.run(
        folder.command("serve", str(folder.path)),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2, finished.stdout
    assert "is no run directory" in finished.stdout
