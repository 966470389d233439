"""Whether a teacher call may be made now: one answer for the whole cluster.

Pure, and told the time: no Ray, no threads, no LM. ``Limiter`` keeps the sliding minute and
the budget; what each model bears is its ``backoff``. ``governor`` is the actor around it,
``gate`` asks on behalf of a process, ``retries`` decides what becomes of a failed call.

The minute is kept in memory: a run that is killed and started again at once begins with an
empty one, and may ask twice what it is allowed to in the minute around it.
"""

import math
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from distill.tracing.backoff import Backoff
from distill.tracing.minute import POLL_S, Charge, Minute
from distill.tracing.permits import REFUSALS, Ask, Bounds, Outcome, Permit, Refusal, Stop, Wait
from serve.dspy_lm import LmFailure

FADE = 0.98
"""What is left of a call's share in what the next one is expected to take."""
LINE_S = 15.0
"""Who still waits for room has asked again within so long."""


@dataclass
class _Call:
    """A call that was let through and is not over."""

    ask: Ask
    since: float
    requests: Charge
    tokens: Charge
    cost_usd: float
    probe: bool = False
    arrived: bool = False


@dataclass
class _Model:
    """What the calls of a model are expected to take, a fading maximum, and what it bears."""

    backoff: Backoff
    tokens: float = 0.0
    cost_usd: float = 0.0
    answered: int = 0


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
        self._models: dict[str, _Model] = {}
        self._line: dict[Ask, float] = {}
        self._next_id = 0
        self._reserved_usd = 0.0
        self.begin(bounds)

    def begin(self, bounds: Bounds) -> None:
        """Start a job of the run; the minute behind it and what calls take stay known."""
        self._bounds = bounds
        self._requests.limit = bounds.requests_per_minute
        self._tokens.limit = bounds.tokens_per_minute
        self.spent_usd = bounds.spent_usd
        self.refusal: Refusal | None = None
        for model in self._models.values():
            in_flight, model.backoff = model.backoff.in_flight, Backoff(self._jitter)
            model.backoff.in_flight = in_flight

    @property
    def in_flight(self) -> int:
        """Calls let through and not over."""
        return len(self._calls)

    def free(self, now: float) -> dict[str, int]:
        """Models whose calls need not ask as long as this holds, and the outages of each."""
        bounds = self._bounds
        bounded = (bounds.requests_per_minute, bounds.tokens_per_minute, bounds.budget_usd)
        if self.refusal is not None or any(bound is not None for bound in bounded):
            return {}
        return {
            name: model.backoff.outages
            for name, model in self._models.items()
            if model.backoff.is_free(now)
        }

    def ask(self, now: float, ask: Ask) -> Permit | Wait | Refusal:
        """Ask to make a call at a time."""
        self._expire(now)
        model = self._model(ask.model)
        if self.refusal is None:
            self.refusal = self._must_refuse(now, ask, model)
        if self.refusal is not None:
            return self.refusal
        wait_s = self._must_wait(now, ask, model)
        if wait_s is not None:
            return Wait(wait_s)
        call = _Call(
            ask=ask,
            since=now,
            requests=self._requests.charge(ask.requests),
            tokens=self._tokens.charge(math.ceil(model.tokens)),
            cost_usd=model.cost_usd,
            probe=model.backoff.begin_asked(),
        )
        return Permit(self._let_through(call), model.backoff.outages, call.probe)

    def admit(self, ask: Ask) -> int:
        """Take note of a call that did not have to ask; returns what names it."""
        self._model(ask.model).backoff.begin()
        # Under way before whatever it would have been kept from by now.
        return self._let_through(_Call(ask, -math.inf, Charge(0), Charge(0), 0.0, arrived=True))

    def sent(self, now: float, permit_id: int) -> None:
        """Say that a call's request has left by now."""
        call = self._calls.get(permit_id)
        if call is not None:
            self._arrive(call, now)

    def finish(self, now: float, permit_id: int | None, outcome: Outcome) -> float:
        """Say that a call is over; returns by how many seconds it makes a pause longer."""
        call = None if permit_id is None else self._calls.pop(permit_id, None)
        if call is None:
            # Whoever made it was taken to be dead; it was paid all the same.
            self.spent_usd += outcome.cost_usd or 0.0
            return 0.0
        self._expire(now)
        self._arrive(call, now)
        if outcome.tokens is not None and call.since > -math.inf:
            self._tokens.correct(call.tokens, outcome.tokens, now)
        self._end(call)
        self._account(call, outcome)
        backoff = self._models[call.ask.model].backoff
        return backoff.learn(now, call.since, call.probe, outcome)

    def give_back(self, permit_id: int) -> None:
        """Say that no call was made with a permit."""
        call = self._calls.pop(permit_id, None)
        if call is not None:
            self._end(call)
            if not call.arrived:
                self._requests.cancel(call.requests)
                self._tokens.cancel(call.tokens)

    def lose(self, now: float, permit_id: int) -> None:
        """Say that nobody will tell how a call ended."""
        self.finish(now, permit_id, Outcome(LmFailure.ABANDONED))

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            self._models[name] = _Model(Backoff(self._jitter))
        return self._models[name]

    def _must_refuse(self, now: float, ask: Ask, model: _Model) -> Refusal | None:
        if ask.model == self._bounds.absent:
            return REFUSALS[Stop.ABSENT]
        budget = self._bounds.budget_usd
        if budget is not None and self.spent_usd + model.cost_usd >= budget:
            return REFUSALS[Stop.BUDGET]
        return REFUSALS[Stop.OUTAGE] if model.backoff.is_lost(now) else None

    def _must_wait(self, now: float, ask: Ask, model: _Model) -> float | None:
        """Seconds until it makes sense to ask again; None is no wait."""
        wait_s = model.backoff.wait(now)
        measured = self._bounds.budget_usd is not None or self._tokens.limit is not None
        if wait_s is None and measured and not model.answered and model.backoff.in_flight:
            # What a call takes is not known yet: one tells it.
            wait_s = POLL_S
        if wait_s is None and (room_s := self._wait_for_room(now, ask, model)) is not None:
            self._line[ask] = now
            return room_s
        self._line.pop(ask, None)
        return wait_s

    def _wait_for_room(self, now: float, ask: Ask, model: _Model) -> float | None:
        if self._is_behind(now, ask):
            return POLL_S
        budget = self._bounds.budget_usd
        if budget is not None and self.spent_usd + self._reserved_usd + model.cost_usd >= budget:
            return POLL_S
        waits = [
            self._requests.wait(now, ask.requests),
            self._tokens.wait(now, math.ceil(model.tokens)),
        ]
        return max((wait for wait in waits if wait is not None), default=None)

    def _is_behind(self, now: float, ask: Ask) -> bool:
        """Whether one that takes more has waited longer: smaller ones would leave it no room."""
        for other, asked_at in list(self._line.items()):
            if now - asked_at > LINE_S:
                del self._line[other]
            elif other == ask:
                return False
            elif any(map(operator.gt, self._need(other), self._need(ask))):
                return True
        return False

    def _need(self, ask: Ask) -> tuple[float, float, float]:
        model, bounds = self._models[ask.model], self._bounds
        return (
            ask.requests if bounds.requests_per_minute is not None else 0,
            math.ceil(model.tokens) if bounds.tokens_per_minute is not None else 0,
            model.cost_usd if bounds.budget_usd is not None else 0.0,
        )

    def _expire(self, now: float) -> None:
        self._requests.expire(now)
        self._tokens.expire(now)

    def _arrive(self, call: _Call, when: float) -> None:
        if not call.arrived:
            call.arrived = True
            self._requests.arrived(call.requests, when)
            self._tokens.arrived(call.tokens, when)

    def _let_through(self, call: _Call) -> int:
        self._next_id += 1
        self._calls[self._next_id] = call
        self._reserved_usd += call.cost_usd
        return self._next_id

    def _end(self, call: _Call) -> None:
        # Summed anew where it ends: sums of differences drift.
        self._reserved_usd = self._reserved_usd - call.cost_usd if self._calls else 0.0
        self._models[call.ask.model].backoff.end(call.probe)

    def _account(self, call: _Call, outcome: Outcome) -> None:
        failure, cost_usd = outcome.failure, outcome.cost_usd
        if cost_usd is None and failure in (LmFailure.TIMED_OUT, LmFailure.ABANDONED):
            # Nobody waits for the answer any more; it may be billed all the same.
            cost_usd = call.cost_usd
        self.spent_usd += cost_usd or 0.0
        if failure is LmFailure.HOPELESS:
            self.refusal = self.refusal or Refusal(Stop.HOPELESS, outcome.said)
        if failure is not None:
            return
        if outcome.tokens == 0:
            # From DSPy's cache: it says nothing about what the next one takes.
            return
        model = self._models[call.ask.model]
        model.answered += 1
        model.tokens = max(outcome.tokens or 0, FADE * model.tokens)
        model.cost_usd = max(cost_usd or 0.0, FADE * model.cost_usd)
        if cost_usd is None and self._bounds.budget_usd is not None:
            self.refusal = self.refusal or REFUSALS[Stop.UNPRICED]
        if outcome.tokens is None and self._bounds.tokens_per_minute is not None:
            self.refusal = self.refusal or REFUSALS[Stop.UNCOUNTED]
