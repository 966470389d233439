"""A student directory says what it is, and gives back the program it was made for."""

import asyncio
import json
import subprocess
import sys
from typing import Literal

import dspy
import fsspec
import pytest

from serve.dspy_lm import call_usage, student_adapter, student_lm
from serve.engines.base import ChatResult
from serve.errors import ConfigurationError, StudentError
from serve.files import absolute, local_folder
from serve.folding import Folding
from serve.student import Manifest, load_adapter, load_program, load_student
from tests import tiny_student

DEMO = {"text": "a demo", "team": "tech", "urgent": True}
ANSWER = "[[ ## team ## ]]\ntech\n\n[[ ## urgent ## ]]\nTrue\n\n[[ ## completed ## ]]\n"

pytestmark = [pytest.mark.anyio, pytest.mark.dspy]


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def folder(tmp_path):
    folding = Folding.learn({"triage": (tiny_student.Triage, [])}, dspy.ChatAdapter())
    tiny_student.manifest(folding, "tests.tiny_student:build").save(tmp_path)
    program = tiny_student.build()
    program.triage.demos = [dspy.Example(DEMO)]
    program.save(str(tmp_path / "program.json"))
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_is_read_back_as_it_was_written(folder):
    manifest = Manifest.load(folder)
    manifest.save(folder)
    assert Manifest.load(folder) == manifest
    assert sorted(path.name for path in folder.iterdir()) == ["program.json", "student.json"]


def test_a_manifest_from_before_provenance_is_read(folder):
    written = json.loads((folder / "student.json").read_text())
    del written["provenance"]
    (folder / "student.json").write_text(json.dumps(written))
    assert Manifest.load(folder).provenance == {}


def test_the_program_comes_with_its_state_and_without_an_lm(folder):
    program = load_program(folder)
    assert [dict(demo) for demo in program.triage.demos] == [DEMO]
    assert program.triage.lm is None


def test_a_student_without_a_program_says_what_it_is_for(folder):
    edit(folder / "student.json", program=None)
    assert Manifest.load(folder).program is None
    with pytest.raises(StudentError, match=r"no program .*LM\('raydistill/<student>"):
        load_student(folder)


def test_the_adapter_is_found_by_its_class(folder):
    assert type(load_adapter(Manifest.load(folder))) is dspy.ChatAdapter


@pytest.fixture
def configured():
    yield dspy.configure
    dspy.configure(adapter=None)


def make_headed(folder, trained_with):
    folding = Folding.learn({"triage": (tiny_student.Triage, [])}, trained_with)
    factory = "tests.tiny_student:build_headed"
    tiny_student.manifest(folding, factory, trained_with).save(folder)
    tiny_student.build().save(str(folder / "program.json"))
    return folder


def test_the_adapter_that_the_program_sets_keeps_its_arguments(tmp_path, configured):
    adapter = tiny_student.HeadedAdapter("The desk's program")
    assert load_student(make_headed(tmp_path, adapter)).adapter.heading == adapter.heading


def test_an_adapter_of_another_class_is_not_taken(folder, configured):
    configured(adapter=dspy.JSONAdapter())
    assert type(load_adapter(Manifest.load(folder))) is dspy.ChatAdapter


def test_an_adapter_that_has_changed_since_is_a_student_error(tmp_path, configured):
    folder = make_headed(tmp_path, tiny_student.HeadedAdapter("Another heading"))
    with pytest.raises(StudentError, match=r"prompts of triage .*HeadedAdapter.* train"):
        load_student(folder)


def test_a_signature_that_has_changed_since_is_a_student_error(folder):
    wider = tiny_student.Triage.with_updated_fields("team", type_=Literal["billing", "tech"])
    folding = Folding.learn({"triage": (wider, [DEMO])}, dspy.ChatAdapter())
    edit(folder / "student.json", folding=folding.to_json())
    with pytest.raises(StudentError, match="prompts of triage"):
        load_student(folder)


def test_demos_belong_to_the_prompts_that_are_compared(folder):
    with pytest.raises(StudentError, match="prompts of triage"):
        load_student(folder)
    folding = Folding.learn({"triage": (tiny_student.Triage, [DEMO])}, dspy.ChatAdapter())
    edit(folder / "student.json", folding=folding.to_json())
    assert load_student(folder).program.triage.demos


@pytest.fixture
def remote(folder):
    uri = f"memory://{folder.name}/student"
    fs, path = fsspec.url_to_fs(uri)
    fs.put(f"{folder}/", f"{path}/", recursive=True)
    return uri


def test_a_remote_student_is_read_where_it_is(folder, remote):
    assert Manifest.load(remote) == Manifest.load(folder)
    assert [dict(demo) for demo in load_program(remote).triage.demos] == [DEMO]
    assert absolute(remote) == remote
    with pytest.raises(StudentError, match="no such file"):
        Manifest.load(remote + "/nowhere")
    with pytest.raises(StudentError, match="cannot be read"):
        Manifest.load("nosuchscheme://bucket/student")


def test_a_remote_student_is_copied_for_as_long_as_it_is_needed(folder, remote):
    with local_folder(remote) as copy:
        assert Manifest.load(copy) == Manifest.load(folder)
    assert not copy.exists()


def test_a_local_student_is_used_in_place(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in (folder.name, f"file://{folder}", str(folder)):
        assert absolute(name) == str(folder)
        with local_folder(name) as found:
            assert found == folder
    assert folder.exists()


def test_a_missing_directory_is_a_student_error(tmp_path):
    with pytest.raises(StudentError, match="no such file"):
        Manifest.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_damaged_manifest_says_what_is_wrong(folder, changes, message):
    edit(folder / "student.json", **changes)
    with pytest.raises(StudentError, match=message):
        Manifest.load(folder)


@pytest.mark.parametrize("text", ["not json", "[]"])
def test_a_file_that_is_no_manifest_is_a_student_error(folder, text):
    (folder / "student.json").write_text(text)
    with pytest.raises(StudentError, match="JSON"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "path", ["no_such_module:build", "tests.tiny_student:nothing", "tests.tiny_student:ROWS"]
)
def test_a_program_that_is_not_there_is_a_student_error(folder, path):
    edit(folder / "student.json", program=path)
    with pytest.raises(ConfigurationError, match="program: "):
        load_program(folder)


def test_a_program_that_has_changed_is_a_student_error(folder):
    (folder / "program.json").write_text('{"another": {}}')
    with pytest.raises(StudentError, match="has changed"):
        load_program(folder)


def test_reading_a_student_needs_neither_ray_nor_torch_nor_dspy():
    code = (
        "import sys, serve.folding, serve.student, serve.errors, serve.engines.base;"
        "sys.exit(bool({'ray', 'torch', 'dspy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Script:
    """Completes every request with the same answer."""

    def __init__(self) -> None:
        self.requests = []

    async def complete(self, request):
        self.requests.append(request)
        return ChatResult(ANSWER, "stop", 7, 4, True)


async def test_programs_are_answered_from_threads_and_from_the_loop():
    script = Script()
    lm = student_lm(script.complete, asyncio.get_running_loop())

    def call():
        with dspy.context(lm=lm, adapter=student_adapter(dspy.ChatAdapter())):
            return tiny_student.build_async()(text="help")

    sync = await asyncio.to_thread(call)
    with dspy.context(lm=lm.copy(temperature=0.5), adapter=student_adapter(dspy.ChatAdapter())):
        both = await tiny_student.build_async().acall(text="help")
    assert (sync.team, sync.urgent, both.team) == ("tech", True, "tech")
    assert [request.temperature for request in script.requests] == [0.0, 0.5]


async def test_usage_is_recorded_and_options_reach_the_request():
    script = Script()
    lm = student_lm(script.complete, asyncio.get_running_loop(), "tickets")
    assert await lm.acall("hi", max_tokens=5, stop="x", seed=3) == [ANSWER]
    assert call_usage(lm.history[-1]) == (7, 4, None)
    assert await lm.acall("hi", n=2) == [ANSWER, ANSWER]
    request = script.requests[0]
    assert (request.max_tokens, request.stop, request.seed) == (5, ("x",), 3)


class Blocking(tiny_student.Desk):
    async def aforward(self, text):
        return self.triage(text=text)


async def test_a_synchronous_call_on_the_loop_is_told_instead_of_waiting_for_ever():
    lm = student_lm(Script().complete, asyncio.get_running_loop())
    with (
        dspy.context(lm=lm, adapter=student_adapter(dspy.ChatAdapter())),
        # DSPy 3.4 raises LM errors of its own in the place of others.
        pytest.raises(Exception, match=r"await self\.predictor\.acall"),
    ):
        await asyncio.wait_for(Blocking().acall(text="help"), 30)


async def test_what_is_not_given_is_left_to_the_student():
    script = Script()
    lm = student_lm(script.complete, asyncio.get_running_loop())
    await lm.acall("hi", max_tokens=None, temperature=None)
    await lm.copy(max_tokens=5).acall("hi")
    assert [request.max_tokens for request in script.requests] == [None, 5]
    assert [request.temperature for request in script.requests] == [0.0, 0.0]


async def test_an_unparseable_answer_is_not_asked_for_again():
    asked = []

    async def complete(request):
        asked.append(request)
        return ChatResult("gibberish", "stop", 1, 1, True)

    lm = student_lm(complete, asyncio.get_running_loop())
    with (
        dspy.context(lm=lm, adapter=student_adapter(dspy.ChatAdapter())),
        pytest.raises(dspy.utils.exceptions.AdapterParseError),
    ):
        await tiny_student.build_async().acall(text="help")
    assert len(asked) == 1
