"""Disks and stores in trouble, through the command: said plainly, and nothing recorded is lost."""

import os

import pytest

from distill.tracing.store import TraceStore
from examples.standin_teacher import serve_in_background
from tests.programs import FILE_LIMIT
from tests.runs import MoodTeacher, RunFolder

pytestmark = pytest.mark.integration

EXAMPLES = 60


@pytest.fixture
def teacher():
    return MoodTeacher()


@pytest.fixture
def folder(tmp_path, teacher):
    with serve_in_background(teacher) as server:
        yield RunFolder(tmp_path, server.api_base)


def fails(folder, *said):
    """Trace, and see that it fails with such words in a line or two."""
    process = folder.raydistill("trace")
    assert process.returncode == 1, process.stdout
    (message,) = [line for line in process.stdout.splitlines() if line.startswith("raydistill:")]
    for words in said:
        assert words in message
    assert "Traceback" not in process.stdout


def succeeds(folder):
    process = folder.raydistill("trace")
    assert process.returncode == 0, process.stdout
    assert f"{EXAMPLES} ok" in process.stdout


def recorded(folder):
    return {trace.key for trace in TraceStore(str(folder.run_dir / "traces")).scan()}


def test_a_disk_that_fills_up_stops_the_run_and_with_room_it_goes_on(
    tmp_path, teacher, monkeypatch
):
    with serve_in_background(teacher) as server:
        program = {"program": "tests.programs:build_on_a_small_disk"}
        folder = RunFolder(tmp_path, server.api_base, program)
        monkeypatch.setenv(FILE_LIMIT, "8000")
        fails(folder, "the trace store cannot be written", "Make room", "what was traced is kept")
        before, asked = recorded(folder), teacher.calls
        assert 0 < len(before) < EXAMPLES
        assert asked <= len(before) + 2 * (4 + 1)
        monkeypatch.delenv(FILE_LIMIT)
        succeeds(folder)
    assert before < recorded(folder)
    assert teacher.calls == asked + EXAMPLES - len(before)


def test_a_store_that_is_read_only_is_said_before_the_first_call(folder, teacher):
    folder.run_dir.mkdir(parents=True)
    traces = folder.run_dir / "traces"
    # Root is let through by permissions, but nobody makes files there.
    traces.symlink_to("/sys/kernel")
    fails(folder, f"{traces}: the trace store cannot be written", "Make it writable")
    assert teacher.calls == 0
    traces.unlink()
    succeeds(folder)
    assert teacher.calls == EXAMPLES


def test_a_disk_without_room_for_the_run_directory_is_said(folder, teacher):
    folder.run_dir.mkdir(parents=True)
    events = folder.run_dir / "events.jsonl"
    events.symlink_to("/dev/full")
    fails(folder, "No space left on device", "Make room and run the same command again")
    assert teacher.calls == 0


def test_a_torn_record_is_made_again_and_a_damaged_one_is_named(folder, teacher):
    succeeds(folder)
    segment = max((folder.run_dir / "traces").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(segment, segment.stat().st_size - 10)
    succeeds(folder)
    assert teacher.calls == EXAMPLES + 1
    lines = segment.read_bytes().splitlines(keepends=True)
    damaged = lines[1].replace(b"mood", b"moot", 1)
    segment.write_bytes(b"".join([lines[0], damaged, *lines[2:]]))
    fails(folder, f"{segment}, line 2: is damaged", "remove that line")
    assert teacher.calls == EXAMPLES + 1
    segment.write_bytes(b"".join([lines[0], *lines[2:]]))
    succeeds(folder)
    assert teacher.calls == EXAMPLES + 2
