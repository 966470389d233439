"""What a model's replies say about how much more to ask of it. Pure, and told the time.

Refusals and timeouts lower the calls in flight, answers raise them again; the teacher's own
wish to be left alone is kept; an outage is waited out, with one call at a time to probe it.
Each model has its own: a program's predictors and its metric may ask different providers.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distill.tracing.permits import Outcome
from serve.dspy_lm import LmFailure

POLL_S = 0.05
OUTAGE_AFTER = 5
"""Calls in a row that nobody answered, after which the teacher is taken to be down."""
OUTAGE_LIMIT_S = 900.0
MAX_PROBE_S = 60.0
GAIN = 0.05
"""Growth of the calls in flight while as many of them succeed as there are."""
TIMEOUTS_SEEN, TIMEOUTS_BAD = 50, 5
"""So many timeouts among the latest calls mean too many in flight; fewer, a bad connection."""


_WISHES = (LmFailure.REFUSED, LmFailure.DOWN, LmFailure.BROKEN)
"""Failures with which the teacher may say when it wants to be asked again."""


@dataclass
class _Outage:
    """The teacher is down since then; one call probes it from time to time."""

    since: float
    next_probe: float
    probes: int = 0
    probing: bool = False


class Backoff:
    """Counts the calls of a model, and learns from how they end.

    Args:
        jitter: Draws from [0, 1).
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self.in_flight = 0
        self.outages = 0
        self._paused_until = -math.inf
        self._jitter = jitter
        self._cap = math.inf
        self._cut_at = -math.inf
        self._timeouts: deque[bool] = deque(maxlen=TIMEOUTS_SEEN)
        self._silent = 0
        self._outage: _Outage | None = None

    def is_free(self, now: float) -> bool:
        """Whether nothing has to be kept to."""
        return self._outage is None and self._cap == math.inf and now >= self._paused_until

    def is_lost(self, now: float) -> bool:
        """Whether an outage has gone on for too long."""
        return self._outage is not None and now - self._outage.since > OUTAGE_LIMIT_S

    def wait(self, now: float) -> float | None:
        """Seconds until it makes sense to ask again; None is no wait."""
        if now < self._paused_until:
            # Not all at once when the pause is over.
            return self._paused_until - now + POLL_S * self._jitter()
        if self._outage and (self._outage.probing or now < self._outage.next_probe):
            return max(self._outage.next_probe - now, POLL_S)
        return POLL_S if self.in_flight >= self._cap else None

    def begin(self) -> None:
        """Count a call that did not have to ask."""
        self.in_flight += 1

    def begin_asked(self) -> bool:
        """Count a call; returns whether it is a probe."""
        self.in_flight += 1
        if self._outage is None:
            return False
        self._outage.probing = True
        return True

    def end(self, probe: bool) -> None:
        """Count a call no more."""
        self.in_flight -= 1
        if probe and self._outage:
            self._outage.probing = False

    def learn(self, now: float, since: float, probe: bool, outcome: Outcome) -> float:
        """Take note of how a call ended that began then.

        Returns:
            By how many seconds it makes a pause longer.
        """
        failure, paused_s = outcome.failure, 0.0
        if failure is LmFailure.ABANDONED:
            return paused_s
        if outcome.retry_after_s is not None and failure in _WISHES:
            until = now + outcome.retry_after_s
            paused_s = max(until - max(self._paused_until, now), 0.0)
            self._paused_until = max(self._paused_until, until)
        self._timeouts.append(failure is LmFailure.TIMED_OUT)
        if failure is LmFailure.REFUSED or self._timeouts.count(True) >= TIMEOUTS_BAD:
            self._cut(now, since)
        elif failure is None and 2 * self.in_flight >= self._cap:
            self._cap += max(GAIN, 1 / self._cap)
        if failure in (LmFailure.DOWN, LmFailure.BROKEN, LmFailure.TIMED_OUT):
            self._no_answer(now, probe)
        else:
            self._silent = 0
            self._outage = None
        return paused_s

    def _cut(self, now: float, since: float) -> None:
        # Once for all the calls that were under way when it became too much.
        if since >= self._cut_at:
            self._cap = max(1.0, (self.in_flight + 1) / 2)
            self._cut_at = now
        self._timeouts.clear()

    def _no_answer(self, now: float, probe: bool) -> None:
        self._silent += 1
        if self._outage is None:
            if self._silent >= OUTAGE_AFTER:
                self.outages += 1
                self._outage = _Outage(since=now, next_probe=now + self._probe_after(0))
        elif probe:
            self._outage.probes += 1
            self._outage.next_probe = now + self._probe_after(self._outage.probes)

    def _probe_after(self, probes: int) -> float:
        return min(2.0**probes, MAX_PROBE_S) * (0.5 + self._jitter() / 2)
