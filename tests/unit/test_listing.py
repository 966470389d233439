"""What ``raydistill traces`` shows of a store, and writes to a file."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from distill import imports
from distill.listing import Filter, export, judged_traces, render
from distill.progress import ProgressReporter
from distill.rundir import RunDir
from distill.tracing.store import TraceStore
from distill.tracing.trace import Failure, FailureKind, PredictorCall, Score, Trace, Usage
from serve.errors import ConfigurationError

TIMEOUT = Failure(FailureKind.TEACHER, "LMTimeoutError", "too slow")


def trace(example, score=None, failure=None, predictor="judge", **changes):
    calls = () if failure else (PredictorCall(predictor, {"text": example}, {"mood": "good"}),)
    verdict = None if score is None else Score("m", score)
    return Trace(
        f"{example}{changes}",
        example,
        calls,
        {"mood": "good"},
        Usage(),
        0.0,
        verdict,
        failure,
        **changes,
    )


@pytest.fixture
def directory(tmp_path):
    """What a compile leaves behind: traces, and no configuration."""
    traces = [
        trace("bright", 1.0),
        trace("dull", 0.0),
        trace("dull", 1.0, hinted=True),
        trace("asleep", failure=TIMEOUT),
        trace("other", 1.0, predictor="answer"),
    ]
    TraceStore(f"{tmp_path}/traces").writer().append([each.to_json() for each in traces])
    return RunDir(str(tmp_path))


def shown(directory, **filters):
    traces = judged_traces(directory, ProgressReporter(Console(quiet=True)))
    return sorted((t.example_id, t.hinted, why) for t, why in Filter(**filters).apply(traces))


def test_traces_are_chosen_by_verdict_reason_error_and_predictor(directory):
    assert len(shown(directory)) == 5
    kept = [("bright", False, None), ("dull", True, None), ("other", False, None)]
    assert shown(directory, kept=True) == kept
    rejected = [("asleep", False, "error"), ("dull", False, "metric")]
    assert shown(directory, rejected="") == rejected
    assert shown(directory, rejected="metric") == rejected[1:]
    assert shown(directory, rejected="LMTimeoutError") == rejected[:1]
    assert shown(directory, predictor="answer") == kept[2:]


def test_the_table_shows_verdicts_errors_and_counts(directory):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(judged_traces(directory, ProgressReporter(console)), limit=4))
    text = console.export_text()
    for words in ("kept", "metric", "hint", "too slow", "text: bright", "4 of 5 traces: 3 kept"):
        assert words in text


def test_what_is_exported_can_be_imported(directory, tmp_path):
    file = str(tmp_path / "out.jsonl")
    traces = list(judged_traces(directory, ProgressReporter(Console(quiet=True))))
    assert export(traces, file) == 5
    lines = Path(file).read_text().splitlines()
    assert [json.loads(line)["rejected"] for line in lines] == [why for _, why in traces]
    assert list(imports.read([file])) == [trace for trace, _ in traces]
    with pytest.raises(ConfigurationError, match="cannot be written"):
        export(traces, str(tmp_path / "none" / "out.jsonl"))


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="has no traces"):
        list(judged_traces(RunDir(str(tmp_path)), ProgressReporter(Console(quiet=True))))
