"""The whole line through the command line: what a run leaves, and that kills don't hurt it."""

import csv
import hashlib
import json
import signal
import socket

import httpx
import pytest
import transformers

from examples.standin_teacher import serve_in_background
from tests.runs import MoodTeacher, RunFolder

pytestmark = [pytest.mark.integration, pytest.mark.dspy]


LEFT_BEHIND = [
    *("config.json", "events.jsonl", "traces", "rows/train.jsonl", "rows/val.jsonl"),
    *("checkpoints", "report.json", "report.html", "serve.yaml"),
    *("student/config.json", "student/model.safetensors", "student/generation_config.json"),
    *("student/tokenizer.json", "student/tokenizer_config.json", "student/chat_template.jinja"),
    *("student/program.json", "student/student.json"),
]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two predictors, its folder, and the teacher that it called.

    Teacher, student and endpoint all need the client that the program's setup hook makes.
    """
    teacher = MoodTeacher()
    with serve_in_background(teacher) as server:
        path = tmp_path_factory.mktemp("run")
        changes = {
            "program": "tests.programs:build_connected",
            "setup": "tests.programs:connect",
        }
        folder = RunFolder(path, server.api_base, changes)
        process = folder.raydistill("run")
        assert process.returncode == 0, process.stdout
        yield folder, teacher, process.stdout


def test_a_run_leaves_what_the_design_says(finished):
    folder, _, _ = finished
    for name in LEFT_BEHIND:
        assert (folder.run_dir / name).exists(), name
    assert not list((folder.run_dir / "student").rglob("*.pkl"))


def test_the_student_is_a_plain_hugging_face_model(finished):
    student = finished[0].run_dir / "student"
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    assert model.num_parameters() > 0
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_every_text_was_asked_once_for_each_predictor(finished):
    _, teacher, _ = finished
    assert teacher.calls == 2 * (60 + 12)


def test_the_report_holds_what_was_measured(finished):
    folder, _, _ = finished
    report = read(folder.run_dir / "report.json")
    assert report["arms"]["teacher"]["score"] == 1.0
    assert report["arms"]["student"]["errors"] == 0
    assert report["arms"]["teacher"]["n"] == report["arms"]["student"]["n"] == 12
    assert report["arms"]["base"] is None
    assert report["tracing"]["examples"] == report["tracing"]["kept"] == 60
    assert report["tracing"]["teacher_calls"] == 120
    assert report["tracing"]["cost_usd"] is None
    by_predictor = report["tracing"]["by_predictor"]
    assert {name: usage["calls"] for name, usage in by_predictor.items()} == {
        "judge": 60,
        "answer": 60,
    }
    tokens = sum(usage["prompt_tokens"] for usage in by_predictor.values())
    assert tokens == report["tracing"]["prompt_tokens"] > 0
    assert report["training"]["steps"] > 0
    assert report["training"]["seconds"] > 0
    assert report["folding"]["rows_folded"] == 120
    assert report["leakage"] == {"test_in_train": 0}
    assert read(folder.run_dir / "student" / "student.json")["metrics"]["teacher_score"] == 1.0


def test_the_student_says_what_it_was_made_from_and_how(finished):
    run_dir = finished[0].run_dir
    manifest = read(run_dir / "student" / "student.json")
    made_from = manifest["provenance"]
    for name, found in made_from["rows"].items():
        rows = (run_dir / "rows" / f"{name}.jsonl").read_bytes()
        assert found["sha256"] == hashlib.sha256(rows).hexdigest()
    assert made_from["rows"].keys() == {"train", "val"}
    config = read(run_dir / "config.json")
    assert made_from["student"] == config["student"]
    assert made_from["train"] == {**config["train"], "use_gpu": False}
    assert {"torch", "transformers", "deepspeed", "ray", "dspy"} <= manifest["versions"].keys()
    assert manifest["metrics"]["student_score"] is not None


def test_no_row_is_of_the_test_set(finished):
    folder = finished[0]
    with (folder.path / "test.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    rows = "".join(path.read_text() for path in (folder.run_dir / "rows").glob("*.jsonl"))
    assert len(texts) == 12
    assert "day 1 was" in rows
    assert not [text for text in texts if text in rows]


def test_the_terminal_shows_stages_and_no_chatter(finished):
    _, _, output = finished
    for word in ("check", "trace", "rows", "train", "evaluate student", "report.html"):
        assert word in output
    assert "Warning" not in output
    assert "pid=" not in output


def test_running_it_again_repeats_nothing(finished):
    folder, teacher, _ = finished
    before = teacher.calls
    manifest = read(folder.run_dir / "student" / "student.json")
    again = folder.raydistill("run")
    assert again.returncode == 0, again.stdout
    assert teacher.calls == before
    assert "the student is up to date" in again.stdout
    assert read(folder.run_dir / "student" / "student.json") == manifest


def test_evaluating_another_student_than_the_configurations_is_refused(finished):
    folder, teacher, _ = finished
    before = teacher.calls
    process = folder.raydistill("evaluate", "train.learning_rate=0.5")
    assert process.returncode == 1, process.stdout
    assert "Run raydistill train first" in process.stdout
    assert teacher.calls == before


def test_the_report_command_rebuilds_the_page(finished):
    folder, _, _ = finished
    page = folder.run_dir / "report.html"
    page.unlink()
    with folder.started("report", str(folder.run_dir)) as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert page.exists()
    assert "student" in output


def test_the_traces_command_lists_the_runs_traces_and_exports_them(finished, tmp_path):
    folder, teacher, _ = finished
    before, file = teacher.calls, tmp_path / "kept.jsonl"
    for options, said in (
        (["--limit", "3"], "3 of 60 traces: 60 kept"),
        (["--rejected"], "No traces."),
        (["--kept", "--predictor", "judge", "--export", str(file)], "60 traces"),
    ):
        with folder.started("traces", str(folder.run_dir), *options) as process:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
        assert said in output
    calls = [call for line in file.read_text().splitlines() for call in json.loads(line)["calls"]]
    assert {call["predictor"] for call in calls} == {"judge"}
    assert len(calls) == 60
    assert teacher.calls == before


def test_the_endpoint_answers_and_stops_on_a_signal(finished):
    folder, _, _ = finished
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with folder.started("serve", str(folder.run_dir), "--port", str(port)) as process:
        for line in process.stdout:
            if "Serving at" in line:
                break
        url = f"http://127.0.0.1:{port}/predict"
        response = httpx.post(url, json={"text": "day 7 was sunny"}, timeout=60)
        # A student this small may answer what cannot be parsed, and must say so.
        assert response.status_code in (200, 502), response.text
        if response.status_code == 200:
            assert set(response.json()) == {"mood", "reply"}
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output


def in_stage(name, event="progress"):
    return lambda seen: seen["event"] == event and seen.get("stage") == name


def test_a_run_killed_at_any_stage_goes_on_and_finishes(tmp_path):
    teacher = MoodTeacher(latency_s=0.1)
    with serve_in_background(teacher) as server:
        changes = {"train": {"num_train_epochs": 6, "learning_rate": 1e-2, "logging_steps": 1}}
        folder = RunFolder(tmp_path, server.api_base, changes)
        moments = [
            lambda seen: in_stage("trace")(seen) and seen["done"] >= 20,
            in_stage("rows", "stage_end"),
            lambda seen: seen["event"] == "train_epoch" and seen["epoch"] >= 3,
            in_stage("train", "stage_end"),
            in_stage("evaluate teacher", "stage_end"),
        ]
        config = str(tmp_path / "config.yaml")
        for moment in moments:
            with folder.started("run", config) as process:
                folder.wait_for(moment, process)
                process.send_signal(signal.SIGKILL)
        process = folder.raydistill("run")
        assert process.returncode == 0, process.stdout
        in_flight = 2 * 4
        assert teacher.calls <= 60 + 12 + in_flight * len(moments)
        report = read(folder.run_dir / "report.json")
        assert [epoch["epoch"] for epoch in report["training"]["history"]] == [1, 2, 3, 4, 5, 6]
        epochs = [e["epoch"] for e in folder.events() if e["event"] == "train_epoch"]
        assert epochs.count(1) == 1, epochs
