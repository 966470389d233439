"""The words in which teacher calls are asked for, permitted and accounted. Plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from serve.dspy_lm import LmFailure


class Stop(StrEnum):
    """Why tracing ends before its last example."""

    BUDGET = "budget"
    UNPRICED = "unpriced"
    """There is a budget, and the price of a call is not known."""
    UNCOUNTED = "uncounted"
    """There is a limit of tokens, and a reply does not say how many it took."""
    OUTAGE = "outage"
    HOPELESS = "hopeless"
    """The key, the bill or the model is wrong: no call will do better."""
    LOST = "lost"
    """Nobody is there who could let calls through."""
    ABSENT = "absent"
    """The metric asks a teacher that has to be served first."""
    FAILURES = "failures"
    """Too many examples failed."""


@dataclass(frozen=True)
class Bounds:
    """What a run may ask of its teacher; None is no bound.

    Attributes:
        requests_per_minute, tokens_per_minute: Over every sliding minute.
        budget_usd: For all that the run spends.
        spent_usd: What has been spent of it before.
        absent: A model that is not served yet, since it may never be asked.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    budget_usd: float | None = None
    spent_usd: float = 0.0
    absent: str | None = None


@dataclass(frozen=True)
class Ask:
    """A call that somebody would make: of which model, and in how many requests."""

    model: str
    requests: int = 1


@dataclass(frozen=True)
class Permit:
    """Leave to make one call.

    Attributes:
        id: Names the call.
        outages: How many of the model have begun so far.
        probe: Whether the call is to tell if an outage is over.
    """

    id: int
    outages: int = 0
    probe: bool = False


@dataclass(frozen=True)
class Wait:
    """Ask again after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Refusal:
    """No call is let through any more, and why in words."""

    stop: Stop
    why: str


REFUSALS: Mapping[Stop, Refusal] = {
    stop: Refusal(stop, why)
    for stop, why in {
        Stop.BUDGET: "trace.budget_usd does not cover another call.",
        Stop.UNPRICED: "trace.budget_usd cannot be kept: a call has no known price.",
        Stop.UNCOUNTED: "trace.tokens_per_minute cannot be kept: a reply does not tell its tokens.",
        Stop.OUTAGE: "The teacher has not replied for a quarter of an hour.",
        Stop.ABSENT: "The teacher is not served yet.",
    }.items()
}


@dataclass(frozen=True)
class Outcome:
    """How a call ended and what it took.

    Attributes:
        failure: None is an answer.
        tokens, cost_usd: None is not known.
        retry_after_s: After which time the teacher wants to be asked again.
        said: The failure in the teacher's words.
    """

    failure: LmFailure | None = None
    tokens: int | None = None
    cost_usd: float | None = None
    retry_after_s: float | None = None
    said: str = ""
