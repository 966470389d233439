"""What ``raydistill traces`` shows of a store, and writes to a file."""

import io
import json
from pathlib import Path

import dspy
import pytest
from rich.console import Console

from distill import compile_record, imports
from distill.config import TraceConfig
from distill.listing import Filter, export, judged_traces, render
from distill.progress import ProgressReporter
from distill.rows import RowCounts, stream_rows
from distill.rundir import RunDir
from distill.tracing.store import TraceStore
from distill.tracing.trace import Failure, FailureKind, PredictorCall, Score, Trace, Usage
from serve.errors import ConfigurationError
from tests.programs import Sentiment

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
    """What a compile leaves behind."""
    traces = [
        trace("bright", 1.0),
        trace("dull", 0.0),
        trace("dull", 1.0, hinted=True),
        trace("asleep", failure=TIMEOUT),
        trace("other", 1.0, predictor="answer"),
    ]
    older = trace("older", 1.0)
    writer = TraceStore(f"{tmp_path}/traces").writer()
    writer.append([each.to_json() for each in [older, *traces]])
    found = RunDir(str(tmp_path))
    remember(found, TraceConfig(), [each.key for each in traces])
    return found


def remember(directory, trace, keys):
    record = compile_record.CompileRecord(trace=trace, has_metric=True, keys=keys)
    compile_record.write(directory, record)


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
    counts = RowCounts()
    rows = imports.rows([file], render_kept, counts, folding=None)
    assert sorted(row.example_id for row in rows) == ["bright", "dull", "other"]
    with pytest.raises(ConfigurationError, match="cannot be written"):
        export(traces, str(tmp_path / "none" / "out.jsonl"))


def render_kept(traces):
    prompts = {name: (Sentiment, []) for name in ("judge", "answer")}
    return stream_rows(traces, prompts, dspy.ChatAdapter(), RowCounts())


def test_a_compile_chose_by_its_own_threshold(directory):
    keys = compile_record.read(directory).keys
    remember(directory, TraceConfig(metric_threshold=2.0), keys)
    assert shown(directory, kept=True) == []


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="has no traces"):
        list(judged_traces(RunDir(str(tmp_path)), ProgressReporter(Console(quiet=True))))
