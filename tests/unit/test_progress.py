"""What is seen of a stage where nobody looks at a terminal."""

import io

from rich.console import Console

from distill import progress
from distill.progress import ProgressReporter


def test_a_report_is_one_line_in_a_log_file_however_long(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    events, log = [], io.StringIO()
    reporter = ProgressReporter(Console(file=log, width=40), events.append)
    with reporter.stage("train") as stage:
        stage.update(10, 30, "loss 0.588, 3560 tokens/s, validation 0.475, 49.7% [exact]")
        stage.update(20, 30, "loss 0.561, 2919 tokens/s, validation 0.004, 100.0% [exact]")
        stage.update(30, 30, "done")
    first, second, last = log.getvalue().splitlines()
    assert first == "  train 10/30 loss 0.588, 3560 tokens/s, validation 0.475, 49.7% [exact]"
    assert second.startswith("  train 20/30 loss 0.561")
    assert second.endswith(" s left")
    assert last.split()[1:3] == ["train", "done"]
    assert [event["event"] for event in events][:1] == ["stage_start"]
