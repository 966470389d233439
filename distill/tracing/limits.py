"""When tracing should stop: decisions as values, made by pure functions.

``collect`` counts and carries out; this file decides.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from distill.config import TraceConfig
from distill.tracing.permits import Bounds, Stop
from distill.tracing.trace import Failure, FailureKind
from serve.dspy_lm import HOPELESS

MIN_SAMPLE = 20


@dataclass(frozen=True, kw_only=True)
class Limits(Bounds):
    """The bounds of a run, of which ``spent_usd`` is what its other jobs have spent.

    Attributes:
        max_failure_rate: A share of the examples.
    """

    max_failure_rate: float = 1.0

    @classmethod
    def of(cls, trace: TraceConfig, spent_usd: float = 0.0) -> "Limits":
        """Those of a configuration."""
        return cls(
            max_failure_rate=trace.max_failure_rate,
            budget_usd=trace.budget_usd,
            spent_usd=spent_usd,
            requests_per_minute=trace.requests_per_minute,
            tokens_per_minute=trace.tokens_per_minute,
        )

    def after(self, spent_usd: float) -> "Limits":
        """Those that are left where this job has spent so much before."""
        return replace(self, spent_usd=self.spent_usd + spent_usd)


@dataclass
class Counts:
    """What has happened so far, resumed traces included."""

    finished: int = 0
    failed: int = 0
    cost_usd: float = 0.0
    tokens: int = 0
    reasons: Counter[tuple[FailureKind, str]] = field(default_factory=Counter)
    messages: dict[tuple[FailureKind, str], str] = field(default_factory=dict)

    def add(self, failure: Failure | None, cost_usd: float | None) -> None:
        """Count one example; one whose calls were prevented is not finished."""
        self.cost_usd += cost_usd or 0.0
        if failure:
            reason = (failure.kind, failure.type)
            self.reasons[reason] += 1
            self.messages.setdefault(reason, failure.message)
            if failure.kind is FailureKind.PREVENTED:
                return
            self.failed += 1
        self.finished += 1

    def worst(self) -> str:
        """The most common failures, in words."""
        return "; ".join(
            f"{count} x {reason[1]}: {_first_line(self.messages[reason])}"
            for reason, count in self.reasons.most_common(3)
        )


def should_stop(counts: Counts, limits: Limits, total: int) -> Stop | None:
    """Whether to stop handing out examples, and why.

    Budget and limits of calls are not looked at here: the limiter prevents the calls.

    Args:
        counts: What has finished.
        limits: The bounds.
        total: Examples of the whole run.
    """
    for kind, name in counts.reasons:
        if kind is FailureKind.PREVENTED:
            return Stop(name)
        if kind is FailureKind.TEACHER and name in HOPELESS:
            return Stop.HOPELESS
    if too_many_failed(counts.failed, counts.finished, limits, total):
        return Stop.FAILURES
    return None


def too_many_failed(failed: int, finished: int, limits: Limits, total: int) -> bool:
    """Whether so many failed that going on makes no sense; a few early ones say little."""
    return finished >= min(MIN_SAMPLE, total) and failed > limits.max_failure_rate * finished


def explain(stop: Stop, counts: Counts, limits: Limits) -> str:
    """The message of the error that ends the run."""
    said = counts.messages.get((FailureKind.PREVENTED, stop)) or counts.worst()
    what, kept = _first_line(said).rstrip(". "), "What was traced is kept;"
    match stop:
        case Stop.HOPELESS:
            return f"The teacher cannot be used: {what}. Correct teacher.lm or its key."
        case Stop.FAILURES:
            return (
                f"{counts.failed} of {counts.finished} examples failed, more than "
                f"trace.max_failure_rate={limits.max_failure_rate}: {counts.worst()}. {kept} mend "
                "the cause, or raise the rate, and run it again."
            )
        case Stop.UNPRICED:
            return (
                "trace.budget_usd cannot be kept: the teacher's calls have no known price. Remove "
                "the budget, or give the model's price in trace.prices."
            )
        case Stop.UNCOUNTED:
            return (
                "trace.tokens_per_minute cannot be kept: the teacher's replies do not tell their "
                "tokens. Remove it; trace.requests_per_minute can be kept."
            )
        case Stop.OUTAGE:
            return f"The teacher is down: {what}. {kept} run the same command again when it is up."
        case Stop.LOST | Stop.ABSENT:
            return f"{what}. {kept} run the same command again."
        case Stop.BUDGET:
            return (
                f"Stopped at ${limits.spent_usd + counts.cost_usd:.4f} of "
                f"trace.budget_usd={limits.budget_usd}. {kept} raise the budget and run it again "
                "to go on."
            )


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), text)[:200]
