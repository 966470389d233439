"""Whether a teacher call may be made now: one answer for the whole cluster.

Pure, and told the time: no Ray, no threads, no LM. ``Limiter`` keeps the sliding minute, the
calls in flight, the teacher's wishes and the budget. ``governor`` is the actor around it,
``gate`` asks on behalf of a process, ``retries`` decides what becomes of a failed call.
"""

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distill.tracing.minute import Charge, Minute
from distill.tracing.permits import Ask, Bounds, Ended, Outcome, Permit, Stop, Wait

TRAVEL_S = 2.0
"""Seconds from a permit to the request's arrival at the teacher, at the most."""
LEASE_S = 0.5
"""Seconds for which a permit may be used; part of ``TRAVEL_S``."""
POLL_S = 0.05
OUTAGE_AFTER = 5
"""Calls in a row without any reply, after which the teacher is taken to be down."""
OUTAGE_LIMIT_S = 900.0
MAX_PROBE_S = 60.0
GAIN = 0.05
"""Growth of the calls in flight while as many of them succeed as there are."""
TIMEOUTS_SEEN, TIMEOUTS_BAD = 50, 5
"""So many timeouts among the latest calls mean too many in flight; fewer, a bad connection."""
FADE = 0.98
"""What is left of a call's share in what the next one is expected to take."""


@dataclass
class _Call:
    """A call that was let through and is not over."""

    id: int
    ask: Ask
    since: float
    requests: Charge
    tokens: Charge
    cost_usd: float
    probe: bool
    arrived: bool = False


@dataclass
class _Model:
    """What the calls of a model have taken so far: a fading maximum."""

    tokens: float = 0.0
    cost_usd: float = 0.0
    answered: int = 0
    in_flight: int = 0


@dataclass
class _Outage:
    """The teacher is down since then; one call probes it from time to time."""

    since: float
    next_probe: float
    probes: int = 0
    probing: bool = False


class Limiter:
    """Lets calls through.

    Args:
        bounds: What the user allows.
        jitter: Draws from [0, 1).
    """

    def __init__(self, bounds: Bounds, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._requests = Minute(bounds.requests_per_minute)
        self._tokens = Minute(bounds.tokens_per_minute)
        self._calls: dict[int, _Call] = {}
        self._travelling: deque[_Call] = deque()
        self._models: dict[str, _Model] = {}
        self._next_id = 0
        self._reserved_usd = 0.0
        self._outages = 0
        self.begin(bounds)

    def begin(self, bounds: Bounds) -> None:
        """Start a job of the run; the minute behind it and what was learned stay."""
        self._bounds = bounds
        self._requests.limit = bounds.requests_per_minute
        self._tokens.limit = bounds.tokens_per_minute
        self.spent_usd = bounds.spent_usd
        self.stopped: Stop | None = None
        self._cap = math.inf
        self._cut_at = -math.inf
        self._paused_until = -math.inf
        self._timeouts: deque[bool] = deque(maxlen=TIMEOUTS_SEEN)
        self._silent = 0
        self._outage: _Outage | None = None

    @property
    def in_flight(self) -> int:
        """Calls let through and not over."""
        return len(self._calls)

    def ask(self, now: float, ask: Ask) -> Permit | Wait | Stop:
        """Ask to make a call at a time; a permit lasts ``LEASE_S``."""
        self._advance(now)
        model = self._models.setdefault(ask.model, _Model())
        if self.stopped is None:
            self.stopped = self._must_stop(now, ask, model)
        if self.stopped is not None:
            return self.stopped
        wait_s = self._must_wait(now, ask, model)
        if wait_s is not None:
            return Wait(wait_s)
        call = _Call(
            id=self._next_id,
            ask=ask,
            since=now,
            requests=self._requests.charge(ask.requests),
            tokens=self._tokens.charge(model.tokens),
            cost_usd=model.cost_usd,
            probe=self._outage is not None,
        )
        if self._outage is not None:
            self._outage.probing = True
        self._next_id += 1
        self._calls[call.id] = call
        self._reserved_usd += call.cost_usd
        self._travelling.append(call)
        model.in_flight += 1
        return Permit(call.id, self._outages)

    def finish(self, now: float, permit_id: int, outcome: Outcome) -> None:
        """Say that a call is over."""
        call = self._calls.get(permit_id)
        if call is None:
            # Whoever made it was taken to be dead; it was paid all the same.
            self.spent_usd += outcome.cost_usd or 0.0
            return
        self._advance(now)
        self._arrive(call, min(now, call.since + TRAVEL_S))
        self._remove(call)
        if outcome.tokens is not None:
            self._tokens.correct(call.tokens, outcome.tokens, now)
        self._learn(call, outcome)
        self._adapt(now, call, outcome)

    def give_back(self, now: float, permit_id: int) -> None:
        """Say that no call was made with a permit."""
        call = self._calls.get(permit_id)
        if call is None:
            return
        self._advance(now)
        self._remove(call)
        if not call.arrived:
            call.arrived = True
            self._requests.cancel(call.requests)
            self._tokens.cancel(call.tokens)
        if call.probe and self._outage:
            self._outage.probing = False

    def _must_stop(self, now: float, ask: Ask, model: _Model) -> Stop | None:
        if ask.model == self._bounds.absent:
            return Stop.ABSENT
        budget = self._bounds.budget_usd
        if budget is not None and self.spent_usd + model.cost_usd >= budget:
            return Stop.BUDGET
        if self._outage and now - self._outage.since > OUTAGE_LIMIT_S:
            return Stop.OUTAGE
        return None

    def _must_wait(self, now: float, ask: Ask, model: _Model) -> float | None:
        """Seconds until it makes sense to ask again; None is no wait."""
        if now < self._paused_until:
            # Not all at once when the pause is over.
            return self._paused_until - now + POLL_S * self._jitter()
        if self._outage and (self._outage.probing or now < self._outage.next_probe):
            return max(self._outage.next_probe - now, POLL_S)
        if self.in_flight >= self._cap:
            return POLL_S
        measured = self._bounds.budget_usd is not None or self._tokens.limit is not None
        if measured and not model.answered and model.in_flight:
            # What a call takes is not known yet: one tells it.
            return POLL_S
        budget = self._bounds.budget_usd
        if budget is not None and self.spent_usd + self._reserved_usd + model.cost_usd >= budget:
            return POLL_S
        waits = [self._requests.wait(now, ask.requests), self._tokens.wait(now, model.tokens)]
        return max((wait for wait in waits if wait is not None), default=None)

    def _advance(self, now: float) -> None:
        while self._travelling and self._travelling[0].since + TRAVEL_S <= now:
            call = self._travelling.popleft()
            self._arrive(call, call.since + TRAVEL_S)
        self._requests.expire(now)
        self._tokens.expire(now)

    def _arrive(self, call: _Call, when: float) -> None:
        if not call.arrived:
            call.arrived = True
            self._requests.arrived(call.requests, when)
            self._tokens.arrived(call.tokens, when)

    def _remove(self, call: _Call) -> None:
        del self._calls[call.id]
        # Summed anew where it ends: sums of differences drift.
        self._reserved_usd = self._reserved_usd - call.cost_usd if self._calls else 0.0
        self._models[call.ask.model].in_flight -= 1

    def _learn(self, call: _Call, outcome: Outcome) -> None:
        self.spent_usd += outcome.cost_usd or 0.0
        if outcome.ended is not Ended.ANSWERED:
            return
        model = self._models[call.ask.model]
        model.answered += 1
        model.tokens = max(outcome.tokens or 0, FADE * model.tokens)
        model.cost_usd = max(outcome.cost_usd or 0.0, FADE * model.cost_usd)
        if outcome.cost_usd is None and self._bounds.budget_usd is not None:
            self.stopped = Stop.UNPRICED

    def _adapt(self, now: float, call: _Call, outcome: Outcome) -> None:
        if outcome.ended is Ended.HOPELESS:
            self.stopped = Stop.HOPELESS
        if outcome.retry_after_s is not None and outcome.ended in (Ended.REFUSED, Ended.DOWN):
            self._paused_until = max(self._paused_until, now + outcome.retry_after_s)
        self._timeouts.append(outcome.ended is Ended.TIMED_OUT)
        if outcome.ended is Ended.REFUSED or self._timeouts.count(True) >= TIMEOUTS_BAD:
            self._cut(now, call)
        elif outcome.ended is Ended.ANSWERED and 2 * self.in_flight >= self._cap:
            self._cap += max(GAIN, 1 / self._cap)
        if outcome.ended in (Ended.DOWN, Ended.TIMED_OUT):
            self._no_reply(now, call)
        else:
            self._silent = 0
            self._outage = None

    def _cut(self, now: float, call: _Call) -> None:
        # Once for all the calls that were under way when it became too much.
        if call.since >= self._cut_at:
            self._cap = max(1.0, (self.in_flight + 1) / 2)
            self._cut_at = now
        self._timeouts.clear()

    def _no_reply(self, now: float, call: _Call) -> None:
        self._silent += 1
        if self._outage is None:
            if self._silent >= OUTAGE_AFTER:
                self._outages += 1
                self._outage = _Outage(since=now, next_probe=now + self._probe_after(0))
        elif call.probe:
            self._outage.probes += 1
            self._outage.probing = False
            self._outage.next_probe = now + self._probe_after(self._outage.probes)

    def _probe_after(self, probes: int) -> float:
        return min(2.0**probes, MAX_PROBE_S) * (0.5 + self._jitter() / 2)
