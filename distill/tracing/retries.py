"""What becomes of a failed teacher call: a decision as a value, made by a pure function.

Which failure it was is read off the error by ``serve.dspy_lm``. Waiting and calling again is
``conductor``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from distill.tracing.permits import Ended

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
REFUSALS_PER_RETRY = 4
"""A refused call has cost nothing, and the limiter learns from it: it may be tried more often."""


@dataclass(frozen=True)
class CallFailure:
    """A call that failed, and after which time the teacher would be asked again."""

    ended: Ended
    retry_after_s: float | None = None


@dataclass(frozen=True)
class Retry:
    """Ask again, after so many seconds."""

    after_s: float


@dataclass(frozen=True)
class GiveUp:
    """This call has failed; others may do better."""


@dataclass(frozen=True)
class StopAll:
    """No call will do better."""


def decide(
    failure: CallFailure, attempt: int, max_retries: int, jitter: Callable[[], float]
) -> Retry | GiveUp | StopAll:
    """What to do about a failed attempt.

    Args:
        failure: How it failed.
        attempt: Which one it was; 0 is the first.
        max_retries: Attempts after the first.
        jitter: Draws from [0, 1).
    """
    if failure.ended is Ended.HOPELESS:
        return StopAll()
    if failure.ended is Ended.REFUSED:
        max_retries *= REFUSALS_PER_RETRY
    if failure.ended in (Ended.ANSWERED, Ended.OTHER) or attempt >= max_retries:
        return GiveUp()
    wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * (0.5 + jitter() / 2)
    return Retry(max(wait_s, failure.retry_after_s or 0.0))
