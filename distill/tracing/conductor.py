"""Makes the calls of a process's LMs: with a permit, in time, and again where that helps.

The thin shell around the decisions of ``limiter`` and ``retries``; ``serve.dspy_lm`` brings
every LM call here.
"""

import asyncio
import contextlib
import contextvars
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import dspy

from distill.config import TraceConfig
from distill.tracing import callers
from distill.tracing.gate import Gate, OpenGate
from distill.tracing.permits import Ask, Outcome, Permit, Stop
from distill.tracing.prices import Prices, entry_usage
from distill.tracing.retries import CallFailure, GiveUp, Retry, StopAll, Tries, decide
from distill.tracing.trace import Usage
from serve.dspy_lm import (
    AsyncAttempt,
    Attempt,
    Entry,
    LmFailure,
    is_cached,
    lm_failure,
    own_timeout_s,
    retries_of,
    retry_after_s,
)
from serve.errors import CallPrevented

SENT_S = 2.0
"""A request has left its process so long after its call was made, if nothing holds that up."""
LANE = 90
"""Calls in flight of one LM through one HTTP client: DSPy 3.4's has 100 connections."""
LANE_STEP_S = 1e-3
_lanes: dict[str, Counter[int]] = {}
"""Calls in flight by model and lane: of the whole process, whose clients they go through."""
_lanes_lock = threading.Lock()
_NONE = Tries()


@dataclass(frozen=True)
class CallSettings:
    """How calls are made.

    Attributes:
        timeout_s: For one attempt; None is no more than the LM's own.
        max_retries: None is each LM's own ``num_retries``.
        prices: Over DSPy's own.
    """

    timeout_s: float | None = 120.0
    max_retries: int | None = None
    prices: Prices | None = None

    @classmethod
    def of(cls, trace: TraceConfig) -> "CallSettings":
        """Those of a configuration."""
        return cls(trace.call_timeout_s, trace.max_retries, trace.prices)


@dataclass
class _Call:
    """A call of an LM, in one attempt or several."""

    lm: dspy.BaseLM
    ask: Ask
    max_retries: int
    tries: Tries = _NONE
    outages: int | None = None

    def permitted(self, permit: Permit) -> None:
        # What failed because the teacher was down is not held against the call.
        if self.outages is not None and permit.outages > self.outages:
            self.tries = _NONE
        self.outages = permit.outages


class Conductor:
    """Conducts the calls of governed LMs.

    Args:
        gate: Lets them through.
        settings: How they are made.
        record: Is handed what each answered call took.
        failed: Is handed the error of each call that was given up, or not made.
    """

    def __init__(
        self,
        gate: Gate | OpenGate,
        settings: CallSettings,
        record: Callable[[Usage], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._gate, self._settings = gate, settings
        self._record, self._failed_for_good = record, failed

    def conduct(self, lm: dspy.BaseLM, requests: int, attempt: Attempt) -> object:
        """Make one call from a thread."""
        call = self._call(lm, requests)
        while True:
            with self._preventable():
                permit = self._gate.enter(call.ask)
            call.permitted(permit)
            try:
                with self._lane(lm) as timeout_s:
                    outputs, entries = self._in_time(call, permit, attempt, timeout_s)
            except BaseException as error:
                time.sleep(self._failed(call, permit, error))
            else:
                self._answered(call, permit, entries)
                return outputs

    async def aconduct(self, lm: dspy.BaseLM, requests: int, attempt: AsyncAttempt) -> object:
        """Make one call on an event loop."""
        call = self._call(lm, requests)
        while True:
            with self._preventable():
                permit = await self._gate.aenter(call.ask)
            call.permitted(permit)
            try:
                with self._lane(lm) as timeout_s:
                    outputs, entries = await self._ain_time(call, permit, attempt, timeout_s)
            except BaseException as error:
                await asyncio.sleep(self._failed(call, permit, error))
            else:
                self._answered(call, permit, entries)
                return outputs

    def _call(self, lm: dspy.BaseLM, requests: int) -> _Call:
        given = self._settings.max_retries
        return _Call(lm, Ask(lm.model, requests), retries_of(lm) if given is None else given)

    def _in_time(
        self, call: _Call, permit: Permit, attempt: Attempt, timeout_s: float | None
    ) -> tuple[object, list[Entry]]:
        """The attempt's result, or TimeoutError; what it then still does is not waited for.

        No client's own timeout bounds the whole of a call: a server may go on a byte at a time.
        """
        if timeout_s is None:
            return attempt(None)
        context = contextvars.copy_context()
        running = callers.start(lambda: context.run(attempt, timeout_s))
        if not running.wait(min(SENT_S, timeout_s)):
            self._sent(call, permit)
            if not running.wait(timeout_s - SENT_S):
                raise TimeoutError(f"no answer within {timeout_s:g} s")
        result: tuple[object, list[Entry]] = running.result()
        return result

    async def _ain_time(
        self, call: _Call, permit: Permit, attempt: AsyncAttempt, timeout_s: float | None
    ) -> tuple[object, list[Entry]]:
        """The same on an event loop."""
        # By the loop's own clock: while the loop is held up, no request leaves.
        sent = asyncio.get_running_loop().call_later(SENT_S, self._sent, call, permit)
        try:
            async with asyncio.timeout(timeout_s):
                return await attempt(timeout_s)
        finally:
            sent.cancel()

    def _sent(self, call: _Call, permit: Permit) -> None:
        # Several requests may be made one after the other.
        if call.ask.requests == 1:
            self._gate.sent(permit)

    def _answered(self, call: _Call, permit: Permit, entries: list[Entry]) -> None:
        outcome, cached = Outcome(), is_cached(call.lm)
        try:
            usages = [entry_usage(entry, self._settings.prices, cached) for entry in entries]
            tokens = _sum(
                [n for each in usages for n in (each.prompt_tokens, each.completion_tokens)]
            )
            cost_usd = _sum([each.cost_usd for each in usages])
            outcome = Outcome(tokens=None if tokens is None else int(tokens), cost_usd=cost_usd)
        finally:
            # An LM of the user's own may tell what cannot be counted.
            self._gate.leave(permit, outcome)
        for each in usages:
            self._record(each)

    def _failed(self, call: _Call, permit: Permit, error: BaseException) -> float:
        """Seconds after which to try again; raises where not to."""
        failure, after_s, said = lm_failure(error), retry_after_s(error), _describe(error)
        told = failure
        # What will not be tried again must not hold up others that will: the teacher may be up.
        if call.max_retries == 0:
            told = _WITHOUT_RETRIES.get(failure, failure)
        self._gate.leave(permit, Outcome(told, retry_after_s=after_s, said=said))
        if not isinstance(error, Exception):
            raise error
        failed = CallFailure(failure, after_s, permit.probe)
        match decide(failed, call.tries, call.max_retries, random.random):
            case StopAll():
                unusable = CallPrevented(said, Stop.HOPELESS)
                self._failed_for_good(unusable)
                raise unusable from error
            case GiveUp():
                self._failed_for_good(error)
                raise error
            case Retry(wait_s, tries):
                call.tries = tries
                return wait_s

    @contextlib.contextmanager
    def _preventable(self) -> Iterator[None]:
        try:
            yield
        except CallPrevented as prevented:
            self._failed_for_good(prevented)
            raise

    @contextlib.contextmanager
    def _lane(self, lm: dspy.BaseLM) -> Iterator[float | None]:
        """The attempt's timeout; a little longer for each client that is in full use.

        DSPy keeps an HTTP client for each timeout, so these are different clients.
        """
        own_s, number = own_timeout_s(lm), 0
        with _lanes_lock:
            lanes = _lanes.setdefault(lm.model, Counter())
            while lanes[number] >= LANE:
                number += 1
            lanes[number] += 1
        try:
            timeout_s = self._settings.timeout_s
            if timeout_s is not None:
                timeout_s = min(timeout_s, own_s) if isinstance(own_s, float) else timeout_s
                timeout_s += number * LANE_STEP_S
            yield timeout_s
        finally:
            with _lanes_lock:
                lanes[number] -= 1


_WITHOUT_RETRIES = {
    LmFailure.DOWN: LmFailure.OTHER,
    LmFailure.BROKEN: LmFailure.OTHER,
    LmFailure.TIMED_OUT: LmFailure.ABANDONED,
}
"""What the limiter is told of calls that are made once."""


def _sum(values: Sequence[float | None]) -> float | None:
    """Unknown where a part is, or where nothing is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
