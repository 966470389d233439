"""What ``raydistill traces`` shows: a run's traces, kept and rejected, in a table or a file.

Which traces belong to the run, and what becomes of them, is told by the run's own
configuration, so that the answer is the one that its rows are made by.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill import compile_record, preflight
from distill.config import RunConfig
from distill.config_file import validated
from distill.progress import ProgressReporter
from distill.rundir import RunDir
from distill.runs import Run, teacher_job
from distill.selection import verdicts
from distill.tracing.store import TraceStore
from distill.tracing.trace import Trace
from serve.errors import ConfigurationError

MAX_CHARS = 60
Judged = tuple[Trace, str | None]
"""A trace, and why it was rejected; None if it was kept."""


@dataclass(frozen=True)
class Filter:
    """Which traces to show.

    Attributes:
        kept: Only those that rows are made of.
        rejected: Only the others; of this reason or type of error, if it is not empty.
        predictor: Only traces that call it, and of these only its calls.
    """

    kept: bool = False
    rejected: str | None = None
    predictor: str | None = None

    def apply(self, traces: Iterable[Judged]) -> Iterator[Judged]:
        """Those to show."""
        for trace, why in traces:
            if self.predictor is not None:
                calls = tuple(call for call in trace.calls if call.predictor == self.predictor)
                trace = replace(trace, calls=calls)
                if not calls:
                    continue
            if (self.kept and why) or (self.rejected is not None and not self._is_of(trace, why)):
                continue
            yield trace, why

    def _is_of(self, trace: Trace, why: str | None) -> bool:
        kind = trace.failure.type if trace.failure else None
        return why is not None and self.rejected in ("", why, kind)


def judged_traces(directory: RunDir, progress: ProgressReporter) -> Iterator[Judged]:
    """A run's traces, by example, and what becomes of each.

    Raises:
        ConfigurationError: There are none, or what made them cannot be loaded.
    """
    record = directory.read_json("config.json")
    if record is not None:
        config = validated(RunConfig, record, directory.join("config.json"))
        task, train, dev = preflight.load_traced(config)
        inputs = preflight.Inputs(task, train, dev, test=(), folding=None)
        run = Run(config, inputs, directory, progress)
        has_metric, bounds = task.metric is not None, config.trace
        traces = teacher_job(run).traces()
    else:
        compiled = compile_record.read(directory)
        has_metric, bounds = compiled.has_metric, compiled.trace
        traces = TraceStore(directory.join("traces")).read(compiled.keys)
    for _, group in itertools.groupby(traces, key=lambda trace: trace.example_id):
        runs = list(group)
        yield from zip(runs, verdicts(runs, bounds, has_metric), strict=True)


def export(traces: Iterable[Judged], file: str) -> int:
    """Write traces as JSON lines; returns how many.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    count = 0
    try:
        with open(file, "w", encoding="utf-8") as lines:
            for trace, why in traces:
                lines.write(json.dumps({**trace.to_json(), "rejected": why}) + "\n")
                count += 1
    except OSError as error:
        raise ConfigurationError(f"--export {file}: cannot be written: {error}") from None
    return count


def render(traces: Iterable[Judged], limit: int) -> RenderableType:
    """The first of them as a table, and how many there are."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("example", "run", "verdict", "score", "predictor", "given", "answered"):
        table.add_column(name, no_wrap=name not in ("given", "answered"))
    found: Counter[str] = Counter()
    for trace, why in traces:
        if found.total() < limit:
            _add_rows(table, trace, why)
        found["kept" if why is None else f"rejected by {why}"] += 1
    counts = ", ".join(f"{count} {what}" for what, count in found.most_common())
    shown = f"{min(limit, found.total())} of {found.total()} traces"
    return Group(table, Text(f"\n{shown}: {counts}" if counts else "No traces."))


def _add_rows(table: Table, trace: Trace, why: str | None) -> None:
    run = "hint" if trace.hinted else str(trace.sample)
    score = trace.score.value if trace.score else None
    head: list[str | Text] = [
        trace.example_id[:8],
        run,
        Text(why or "kept", style="red" if why else "green"),
        "" if score is None else f"{score:g}",
    ]
    for call in trace.calls:
        table.add_row(
            *head, call.predictor or "?", Text(_short(call.inputs)), Text(_short(call.outputs))
        )
        head = ["", "", "", ""]
    error = trace.failure.message if trace.failure else trace.score and trace.score.error
    if error or not trace.calls:
        table.add_row(*head, "", "", Text(_cut(error or "no call"), style="red"))


def _short(values: Mapping[str, object]) -> str:
    return _cut(", ".join(f"{name}: {value}" for name, value in values.items()))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…"
