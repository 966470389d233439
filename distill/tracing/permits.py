"""The words in which teacher calls are asked for, permitted and accounted. Plain values."""

from dataclasses import dataclass
from enum import StrEnum


class Ended(StrEnum):
    """How a call ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """Too many requests."""
    TIMED_OUT = "timed_out"
    DOWN = "down"
    """No connection, or the teacher's own error."""
    HOPELESS = "hopeless"
    """The key, the bill or the model is wrong: no call will do better."""
    OTHER = "other"
    """The teacher replied that it will not answer this one."""


class Stop(StrEnum):
    """Why no call is let through any more."""

    BUDGET = "budget"
    UNPRICED = "unpriced"
    OUTAGE = "outage"
    HOPELESS = "hopeless"
    ABSENT = "absent"


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
    """Leave to make one call. ``outages`` counts those that have begun so far."""

    id: int
    outages: int


@dataclass(frozen=True)
class Wait:
    """Ask again after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a call ended and what it took; None is not known."""

    ended: Ended
    tokens: int | None = None
    cost_usd: float | None = None
    retry_after_s: float | None = None
