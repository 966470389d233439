"""A student answers other processes: from its own name, and where it was launched."""

import asyncio
import subprocess
import sys

import cloudpickle
import dspy
import pytest
import ray
import ray.serve

from serve import cluster, handles, launch
from serve.dspy_lm import is_lm_error, model_name
from serve.errors import ConfigurationError, StudentError
from tests import tiny_student

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

TEXT = tiny_student.ROWS[1][0]


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    """A real student; it has learned nothing, but its grammar makes what it says parse."""
    return tiny_student.make_student(tmp_path_factory.mktemp("student"), epochs=0)


def triage(student):
    program = tiny_student.Desk()
    program.set_lm(dspy.LM(model_name(str(student)), cache=False))
    return program


def in_new_process(code, *arguments):
    """What the code prints in another process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("save_program", [False, True])
def test_a_saved_program_answers_in_a_new_process(student_dir, tmp_path, save_program):
    program = triage(student_dir)
    path = tmp_path / ("program" if save_program else "program.json")
    program.save(str(path), save_program=save_program)
    code = (
        "import sys, inspect, dspy, serve.dspy_lm\nfrom tests import tiny_student\n"
        "if sys.argv[1].endswith('json'):\n"
        "    program = tiny_student.Desk()\n    program.load(sys.argv[1])\n"
        "else:\n"
        "    asks = 'allow_pickle' in inspect.signature(dspy.load).parameters\n"
        "    program = dspy.load(sys.argv[1], **({'allow_pickle': True} if asks else {}))\n"
        "print(program(text=sys.argv[2]).team)"
    )
    assert in_new_process(code, path, TEXT) == program(text=TEXT).team


def test_a_pickled_lm_answers_in_another_process(student_dir, tmp_path):
    lm = dspy.LM(model_name(str(student_dir)), cache=False)
    (tmp_path / "lm").write_bytes(cloudpickle.dumps(lm))
    code = (
        "import sys, cloudpickle, pathlib, serve.dspy_lm\n"
        "print(cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes())('hi'))"
    )
    assert in_new_process(code, tmp_path / "lm") == str(lm("hi"))


def applications():
    return set(ray.serve.status().applications)


def asked(student):
    """How many requests the launched student has answered."""
    answered = handles.handle(str(student)).status.remote().result(timeout_s=60)
    return sum(answered.values())


def test_a_launched_student_answers_on_ray_until_it_is_killed(student_dir):
    program = triage(student_dir)
    here = program(text=TEXT).toDict()
    launch.launch(str(student_dir))
    launch.launch(str(student_dir))
    assert len(applications()) == 1
    assert program(text=TEXT).toDict() == here
    assert asyncio.run(program.triage.acall(text=TEXT)).toDict() == here
    assert asked(student_dir) == 2
    for _ in range(2):
        launch.kill(str(student_dir))
    assert not ray.is_initialized()
    assert handles.handle(str(student_dir)) is None
    assert program(text=TEXT).toDict() == here


def test_what_cannot_be_launched_is_told_and_leaves_nothing(student_dir, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for student, options, kind, message in (
        ("scratch", {}, ConfigurationError, "scratch is not trained yet"),
        (tmp_path / "missing", {}, ConfigurationError, "no such directory"),
        (student_dir, {"replicas": 2}, ConfigurationError, "Known are min_replicas"),
        (tmp_path, {}, StudentError, "cannot be served"),
    ):
        with pytest.raises(kind, match=message):
            launch.launch(str(student), **options)
        assert not ray.is_initialized()


class TestOnAClusterThatIsThere:
    @pytest.fixture(scope="class", autouse=True)
    def connected(self):
        cluster.connect()
        yield
        ray.serve.shutdown()
        ray.shutdown()

    @pytest.fixture
    def launched(self, student_dir):
        launch.launch(str(student_dir))
        return str(student_dir)

    def test_other_processes_ask_the_launched_student(self, launched):
        @ray.remote(num_cpus=0)
        def ask(model):
            import serve.dspy_lm  # noqa: F401

            program = tiny_student.Desk()
            program.set_lm(dspy.LM(model, cache=False))
            return program(text=TEXT).toDict()

        before = asked(launched)
        answer = ray.get(ask.remote(model_name(launched)))
        assert answer == triage(launched)(text=TEXT).toDict()
        assert asked(launched) == before + 2

    def test_a_request_that_is_refused_says_why(self, launched):
        with pytest.raises(Exception, match="the model takes at most") as caught:
            triage(launched).triage.lm("word " * 500)
        assert is_lm_error(caught.value)

    def test_what_was_killed_elsewhere_answers_here_at_the_next_try(self, launched):
        @ray.remote(num_cpus=0)
        def kill():
            launch.kill(launched)

        program = triage(launched)
        before = program(text=TEXT).toDict()
        ray.get(kill.remote())
        assert program(text=TEXT).toDict() == before

    def test_more_students_than_there_is_room_for_are_told(self, launched, tmp_path):
        with pytest.raises(ConfigurationError, match="replicas of launched students=1000 needs"):
            launch.launch(str(tmp_path), min_replicas=999, max_replicas=999)
        assert len(applications()) == 1

    def test_others_applications_and_their_ray_are_left_alone(self, launched):
        other = ray.serve.deployment(lambda: "hi", name="other").options(
            ray_actor_options={"num_cpus": 0}
        )
        ray.serve.run(other.bind(), name="other", route_prefix=None)
        launch.kill(launched)
        assert applications() == {"other"}
