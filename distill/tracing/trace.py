"""What is kept of one run of a program: the trace.

Pure values and their JSON form. A trace holds the predictor calls in order, what the
program answered, the score, the usage, and, where the run failed, why: a failed example is
data, not a crash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any


class FailureKind(StrEnum):
    """Who is to blame for a failed example."""

    PARSE = "parse"
    """The LM answered what the adapter could not read."""
    TEACHER = "teacher"
    """The LM did not answer: network, rate limit, authentication."""
    PROGRAM = "program"
    """The user's program raised."""
    PREVENTED = "prevented"
    """No call of the run was made any more; the type says why."""


@dataclass(frozen=True)
class Failure:
    """Why an example failed: the error's type and message, and whose it was."""

    kind: FailureKind
    type: str
    message: str

    @property
    def is_final(self) -> bool:
        """Whether it would be the same again; the teacher may come to answer."""
        return self.kind in (FailureKind.PARSE, FailureKind.PROGRAM)


@dataclass(frozen=True)
class PredictorCall:
    """One call of one predictor; values are JSON values.

    ``predictor`` is its name in the program, or None when the program built it on the fly.
    """

    predictor: str | None
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a trace took. None: the provider did not say."""

    calls: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None


@dataclass(frozen=True)
class Score:
    """A metric's verdict, and on which version of the metric it rests."""

    metric: str
    value: float | None
    error: str | None = None


METRIC = "(metric)"
"""Whose calls a metric's are, where usage is told by predictor."""
UNNAMED = "(other)"
"""Whose calls those are that no predictor of the program's made."""


@dataclass(frozen=True)
class Trace:
    """One run of a program on one example.

    Attributes:
        key: Names example, program, LM and sample at once.
        usage: The program's.
        usages: The same by predictor, and the metric's as well.
        sample: Which of an example's runs it is; 0 is the plain one.
        hinted: Whether the predictors were told the label.
    """

    key: str
    example_id: str
    calls: Sequence[PredictorCall]
    prediction: Mapping[str, Any] | None
    usage: Usage
    latency_s: float
    score: Score | None = None
    failure: Failure | None = None
    usages: Mapping[str, Usage] = field(default_factory=dict)
    sample: int = 0
    hinted: bool = False

    @property
    def spent(self) -> Usage:
        """What the program and the metric took."""
        metric = self.usages.get(METRIC)
        return total_usage([self.usage, metric]) if metric else self.usage

    def to_json(self) -> dict[str, Any]:
        """The trace as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Trace":
        """The trace that ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: The record is not one.
        """
        # Strict, since a damaged name of a field would otherwise go unnoticed.
        unknown = record.keys() - {each.name for each in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
        score, failure = record["score"], record["failure"]
        return cls(
            key=record["key"],
            example_id=record["example_id"],
            calls=tuple(PredictorCall(**call) for call in record["calls"]),
            prediction=record["prediction"],
            usage=Usage(**record["usage"]),
            latency_s=record["latency_s"],
            score=Score(**score) if score else None,
            failure=Failure(**{**failure, "kind": FailureKind(failure["kind"])})
            if failure
            else None,
            usages={name: Usage(**usage) for name, usage in record.get("usages", {}).items()},
            sample=record.get("sample", 0),
            hinted=record.get("hinted", False),
        )


def passes(score: Score | None, threshold: float | None) -> bool:
    """Whether a score lets its example through the metric's filter.

    Without a threshold every score above zero passes, True among them; a negative score
    never does, though it is a true value to Python.
    """
    if score is None or score.value is None:
        return False
    return score.value > 0 if threshold is None else score.value >= threshold


def rejection(trace: Trace, has_metric: bool, threshold: float | None) -> str | None:
    """Why a run of the program is not good enough, in a word; None if it is."""
    if trace.failure is not None:
        return "parse" if trace.failure.kind is FailureKind.PARSE else "error"
    if not has_metric or passes(trace.score, threshold):
        return None
    return "error" if trace.score and trace.score.error else "metric"


def total_usage(usages: Sequence[Usage]) -> Usage:
    """Sums; a sum with an unknown part is unknown. What made no call adds nothing."""
    usages = [usage for usage in usages if usage.calls]

    def total(values: Sequence[Any]) -> Any:
        return None if not values or None in values else sum(values)

    return Usage(
        calls=sum(usage.calls for usage in usages),
        prompt_tokens=total([usage.prompt_tokens for usage in usages]),
        completion_tokens=total([usage.completion_tokens for usage in usages]),
        cost_usd=total([usage.cost_usd for usage in usages]),
    )
