"""Which traces are learned from, and what becomes of the others.

Pure. An example may have several traces, one for each sample and one that was hinted. How
the chosen ones become rows is ``rows``.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from distill.config import TraceConfig
from distill.tracing.trace import Trace
from distill.tracing.trace import rejection as why_rejected

SURPLUS = "surplus"
REASONS = ("metric", "parse", "error", SURPLUS)
"""Why a trace is not learned from; a surplus one is good, but another of its example is kept."""

MAX_MESSAGES = 1_000


def rejection(trace: Trace, config: TraceConfig, has_metric: bool) -> str | None:
    """Why a trace is not good enough to learn from; None if it is."""
    return why_rejected(trace, has_metric and config.keep != "all", config.metric_threshold)


def verdicts(runs: Sequence[Trace], config: TraceConfig, has_metric: bool) -> list[str | None]:
    """Why each trace of an example is not learned from; None for those that are."""
    reasons = [rejection(trace, config, has_metric) for trace in runs]
    good = [number for number, why in enumerate(reasons) if why is None]
    kept = good
    if config.keep == "first":
        kept = good[:1]
    if config.keep == "best" and good:
        # Of equally good ones max() takes the first.
        kept = [max(good, key=lambda number: _value(runs[number]))]
    for number in good:
        reasons[number] = None if number in kept else SURPLUS
    return reasons


@dataclass
class Selection:
    """Chooses among traces as they come, and counts them.

    Attributes:
        config: Which to keep.
        has_metric: Whether a metric chooses.
        examples, traces, kept, hinted: How many; ``hinted`` are among the kept.
        rejected: How many were not kept, by ``REASONS``.
        errors: The messages of failures and of the metric's errors.
        outputs: The fields of the kept predictions, in order.
    """

    config: TraceConfig
    has_metric: bool
    examples: int = 0
    traces: int = 0
    kept: int = 0
    hinted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, None] = field(default_factory=dict)

    def choose(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        """The traces to learn from; those of an example come together, in their order."""
        for _, runs in itertools.groupby(traces, key=lambda trace: trace.example_id):
            yield from self.choose_runs(list(runs))

    def choose_runs(self, runs: Sequence[Trace]) -> list[Trace]:
        """Those of one example to learn from."""
        reasons = verdicts(runs, self.config, self.has_metric)
        kept = [trace for trace, why in zip(runs, reasons, strict=True) if why is None]
        self.examples += bool(runs)
        self.traces += len(runs)
        self.kept += len(kept)
        self.hinted += sum(trace.hinted for trace in kept)
        self.rejected.update(why for why in reasons if why)
        self.outputs.update((name, None) for trace in kept for name in trace.prediction or ())
        for trace in runs:
            self._count(trace)
        return kept

    def rejections(self) -> dict[str, int]:
        """How many were rejected for each reason; a surplus only where there is one."""
        found = {reason: self.rejected[reason] for reason in REASONS}
        return {why: count for why, count in found.items() if count or why != SURPLUS}

    def _count(self, trace: Trace) -> None:
        error = trace.failure.message if trace.failure else trace.score and trace.score.error
        # Messages that all differ, as those that quote the input do, are not worth keeping.
        if error and (error in self.errors or len(self.errors) < MAX_MESSAGES):
            self.errors[error] += 1


def _value(trace: Trace) -> float:
    score = trace.score.value if trace.score else None
    return 0.0 if score is None else score
