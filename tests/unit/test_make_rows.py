"""The rows of a run: from what its store holds, and from what is imported."""

import dataclasses
import io
import json

import pytest
import yaml
from rich.console import Console

from distill import pipeline, preflight, runs
from distill.config_file import load_config
from distill.datasets import example_id
from distill.progress import ProgressReporter
from distill.rundir import RunDir
from distill.tracing.trace import PredictorCall, Trace, Usage
from serve.errors import TracingError

TEXTS = [f"day {number}" for number in range(40)]


@pytest.fixture
def make_run(tmp_path):
    """A run whose teacher has been asked, and has said the given moods for each text."""
    (tmp_path / "a.csv").write_text("\n".join(["text,mood", *(f"{t},good" for t in TEXTS)]))
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")

    def make(moods, **trace):
        config = {
            "name": "r",
            "program": "tests.programs:build",
            "metric": "tests.programs:right_mood",
            "data": {"train": "a.csv", "test": "a.csv", "inputs": ["text"]},
            "teacher": {"lm": {"model": "openai/x"}},
            "trace": {"samples": len(moods), **trace},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        config = load_config(tmp_path / "c.yaml")
        directory = RunDir(f"{config.storage}/{config.name}")
        progress = ProgressReporter(Console(file=io.StringIO()))
        run = runs.Run(config, preflight.load(config), directory, progress)
        write_traces(runs.teacher_job(run), moods)
        return run

    return make


def write_traces(job, moods):
    work = job.work()
    writer = job.store.writer()
    while unit := work.take([]):
        said = {"mood": moods[unit.variant.sample]} if not unit.variant.hinted else {"mood": "good"}
        call = PredictorCall("self", {"text": unit.example.text}, said)
        name = example_id(unit.example)
        usage = Usage(1, 10, 2, 0.5)
        trace = Trace(unit.key, name, (call,), said, usage, 0.0, usages={"self": usage})
        trace = dataclasses.replace(trace, sample=unit.variant.sample, hinted=unit.variant.hinted)
        writer.append([trace.to_json()])


def read(uri):
    with open(uri) as lines:
        return [json.loads(line) for line in lines]


def test_rows_are_scored_now_split_by_example_and_counted(make_run):
    rows = pipeline.make_rows(make_run(["good", "bad"]))
    train, val = read(rows.train), read(rows.val)
    assert len(train) + len(val) == len(TEXTS)
    assert val
    assert not {row["example_id"] for row in train} & {row["example_id"] for row in val}
    assert rows.tracing["examples"] == rows.tracing["kept"] == len(TEXTS)
    assert rows.tracing["rejected"] == {"metric": len(TEXTS), "parse": 0, "error": 0}
    assert rows.tracing["cost_usd"] == len(TEXTS)
    assert rows.outputs == ["mood"]


def test_the_same_traces_make_the_same_rows_and_others_do_not(make_run):
    run = make_run(["good", "good"])
    first = pipeline.make_rows(run)
    assert pipeline.make_rows(run).fingerprint == first.fingerprint
    assert pipeline.make_rows(make_run(["good", "good"], keep="first")).fingerprint != (
        first.fingerprint
    )


def test_imported_rows_stand_beside_the_traced_ones(make_run):
    rows = pipeline.make_rows(make_run(["good"], **{"import": ["chats.jsonl"]}))
    assert read(rows.train)[-1]["messages"][-1] == {"role": "assistant", "content": "ho"}
    assert len(read(rows.train)) + len(read(rows.val)) == len(TEXTS) + 1


def test_nothing_to_learn_from_is_an_error_that_leaves_older_rows_alone(make_run):
    rows = pipeline.make_rows(make_run(["good"]))
    before = read(rows.train)
    run = make_run(["good"], metric_threshold=2.0)
    with pytest.raises(TracingError, match="40 by metric"):
        pipeline.make_rows(run)
    assert read(rows.train) == before
