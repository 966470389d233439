"""When tracing should stop: decisions as values, made by pure functions.

``collect`` counts and carries out; this file decides.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from distill.config import TraceConfig
from distill.tracing.permits import Bounds
from distill.tracing.trace import Failure, FailureKind
from serve.dspy_lm import HOPELESS

MIN_SAMPLE = 20


class StopReason(StrEnum):
    """Why tracing ends before its last example."""

    HOPELESS = "hopeless"
    FAILURES = "failures"
    BUDGET = "budget"
    UNPRICED = "unpriced"
    OUTAGE = "outage"
    ABSENT = "absent"
    """The metric asks a teacher that has to be served first."""


_PREVENTED = {
    "BudgetSpent": StopReason.BUDGET,
    "Unpriced": StopReason.UNPRICED,
    "TeacherDown": StopReason.OUTAGE,
    "TeacherUnusable": StopReason.HOPELESS,
    "TeacherAbsent": StopReason.ABSENT,
}
"""What the errors of calls that were not made say."""


@dataclass(frozen=True)
class Limits:
    """The bounds of a run.

    Attributes:
        max_failure_rate: A share of the examples.
        budget_usd: For all that the run spends; None is no bound.
        spent_usd: What other jobs of the run have spent of it.
        requests_per_minute, tokens_per_minute: Of all actors together; None is no bound.
    """

    max_failure_rate: float = 1.0
    budget_usd: float | None = None
    spent_usd: float = 0.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

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

    def bounds(self, spent_usd: float) -> Bounds:
        """What the limiter is to keep, where this job has spent so much before."""
        return Bounds(
            self.requests_per_minute,
            self.tokens_per_minute,
            self.budget_usd,
            self.spent_usd + spent_usd,
        )


@dataclass
class Counts:
    """What has happened so far, resumed traces included."""

    finished: int = 0
    failed: int = 0
    cost_usd: float = 0.0
    tokens: int = 0
    unpriced: bool = False
    """Whether a call was made whose price is not known."""
    reasons: Counter[tuple[FailureKind, str]] = field(default_factory=Counter)
    messages: dict[tuple[FailureKind, str], str] = field(default_factory=dict)

    def add(self, failure: Failure | None, cost_usd: float | None) -> None:
        """Count one finished example."""
        self.finished += 1
        self.cost_usd += cost_usd or 0.0
        if failure:
            self.failed += 1
            reason = (failure.kind, failure.type)
            self.reasons[reason] += 1
            self.messages.setdefault(reason, failure.message)

    def worst(self) -> str:
        """The most common failures, in words."""
        return "; ".join(
            f"{count} x {reason[1]}: {_first_line(self.messages[reason])}"
            for reason, count in self.reasons.most_common(3)
        )


def should_stop(counts: Counts, limits: Limits, in_flight: int, total: int) -> StopReason | None:
    """Whether to stop handing out examples, and why.

    Args:
        counts: What has finished.
        limits: The bounds.
        in_flight: Examples handed out and not finished, which may still cost money.
        total: Examples of the whole run.
    """
    names = [name for kind, name in counts.reasons if kind is FailureKind.TEACHER]
    if any(name in HOPELESS for name in names):
        return StopReason.HOPELESS
    for name, reason in _PREVENTED.items():
        if name in names:
            return reason
    if too_many_failed(counts.failed, counts.finished, limits, total):
        return StopReason.FAILURES
    if limits.budget_usd is not None and counts.unpriced:
        return StopReason.UNPRICED
    if limits.budget_usd is not None:
        expected = counts.cost_usd / max(counts.finished, 1) * (in_flight + 1)
        if limits.spent_usd + counts.cost_usd + expected >= limits.budget_usd:
            return StopReason.BUDGET
    return None


def too_many_failed(failed: int, finished: int, limits: Limits, total: int) -> bool:
    """Whether so many failed that going on makes no sense; a few early ones say little."""
    return finished >= min(MIN_SAMPLE, total) and failed > limits.max_failure_rate * finished


def explain(reason: StopReason, counts: Counts, limits: Limits) -> str:
    """The message of the error that ends the run."""
    if reason is StopReason.HOPELESS:
        return f"The teacher cannot be used: {counts.worst()} Correct teacher.lm or its key."
    if reason is StopReason.FAILURES:
        return (
            f"{counts.failed} of {counts.finished} examples failed, more than "
            f"trace.max_failure_rate={limits.max_failure_rate}: {counts.worst()}. What was traced "
            "is kept; mend the cause, or raise the rate, and run it again."
        )
    if reason is StopReason.UNPRICED:
        return (
            "trace.budget_usd cannot be kept: the teacher's calls have no known price. Remove the "
            "budget, or choose a model that DSPy knows the price of."
        )
    if reason is StopReason.OUTAGE:
        return (
            f"The teacher is down: {counts.worst()} What was traced is kept; run the same command "
            "again when it is up."
        )
    return (
        f"Stopped at ${limits.spent_usd + counts.cost_usd:.4f} of "
        f"trace.budget_usd={limits.budget_usd}. What was traced is kept; raise the budget and run "
        "it again to go on."
    )


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), text)[:200]
