"""What becomes of a failed teacher call: a decision as a value, made by a pure function.

Which failure it was is read off the error by ``serve.dspy_lm``. Waiting and calling again is
``conductor``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from serve.dspy_lm import LmFailure

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LENIENCE = 4
"""A refused call has cost nothing, and the limiter learns from it; a probe that finds the teacher
down is the outage's failure, unless it is the call that brings the teacher down. So many of each
are allowed for each retry."""
_TRIED_AGAIN = (LmFailure.REFUSED, LmFailure.DOWN, LmFailure.BROKEN, LmFailure.TIMED_OUT)


@dataclass(frozen=True)
class CallFailure:
    """A call that failed.

    Attributes:
        failure: How.
        retry_after_s: After which time the teacher would be asked again.
        probe: Whether the call was one that tells if an outage is over.
    """

    failure: LmFailure
    retry_after_s: float | None = None
    probe: bool = False


@dataclass(frozen=True)
class Tries:
    """The failed attempts of a call; refusals and failed probes are counted apart."""

    failed: int = 0
    refused: int = 0
    probed: int = 0


@dataclass(frozen=True)
class Retry:
    """Ask again, after so many seconds; so many attempts count then."""

    after_s: float
    tries: Tries


@dataclass(frozen=True)
class GiveUp:
    """This call has failed; others may do better."""


@dataclass(frozen=True)
class StopAll:
    """No call will do better."""


def decide(
    failed: CallFailure, tries: Tries, max_retries: int, jitter: Callable[[], float]
) -> Retry | GiveUp | StopAll:
    """What to do about a failed attempt.

    Args:
        failed: How it failed.
        tries: The attempts before it.
        max_retries: Attempts after the first.
        jitter: Draws from [0, 1).
    """
    if failed.failure is LmFailure.HOPELESS:
        return StopAll()
    if failed.failure not in _TRIED_AGAIN:
        return GiveUp()
    if failed.failure is LmFailure.REFUSED:
        number, most = tries.refused, LENIENCE * max_retries
        tries = replace(tries, refused=number + 1)
    elif failed.failure is LmFailure.DOWN and failed.probe:
        number, most = tries.probed, LENIENCE * max_retries
        tries = replace(tries, probed=number + 1)
    else:
        number, most = tries.failed, max_retries
        tries = replace(tries, failed=number + 1)
    if number >= most:
        return GiveUp()
    wait_s = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * (0.5 + jitter() / 2)
    # The limiter makes the call wait for the rest of what the teacher wants, if that is long.
    wait_s = max(wait_s, min(failed.retry_after_s or 0.0, LONGEST_WAIT_S))
    return Retry(wait_s, tries)
