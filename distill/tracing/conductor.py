"""Makes the calls of a process's LMs: with a permit, in time, and again where that helps.

The thin shell around the decisions of ``limiter`` and ``retries``; ``serve.dspy_lm`` brings
every LM call here.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import dspy

from distill.config import TraceConfig
from distill.tracing.gate import Gate, OpenGate, Stopped
from distill.tracing.permits import Ask, Ended, Outcome, Permit, Stop
from distill.tracing.prices import Price, Prices, entry_usage
from distill.tracing.retries import CallFailure, GiveUp, Retry, StopAll, decide
from distill.tracing.trace import Usage, total_usage
from serve.dspy_lm import AsyncAttempt, Attempt, Entry, is_cached, lm_failure, retry_after_s
from serve.errors import (
    BudgetSpent,
    CallPrevented,
    TeacherAbsent,
    TeacherDown,
    TeacherUnusable,
    Unpriced,
)

LANE = 90
"""Calls in flight of one LM through one HTTP client: DSPy 3.4's has 100 connections."""
LANE_STEP_S = 1e-3
_lanes: dict[str, Counter[int]] = {}
"""Calls in flight by model and lane: of the whole process, whose clients they go through."""
_lanes_lock = threading.Lock()

_REFUSALS: dict[Stop, tuple[type[CallPrevented], str]] = {
    Stop.BUDGET: (BudgetSpent, "trace.budget_usd does not cover another call."),
    Stop.UNPRICED: (Unpriced, "trace.budget_usd cannot be kept: a call has no known price."),
    Stop.OUTAGE: (TeacherDown, "The teacher has not replied for a quarter of an hour."),
    Stop.HOPELESS: (TeacherUnusable, "The teacher refuses all calls."),
    Stop.ABSENT: (TeacherAbsent, "The teacher is not served yet."),
}


@dataclass(frozen=True)
class CallSettings:
    """How calls are made.

    Attributes:
        timeout_s: For one attempt; None is the LM's own.
        max_retries: None is each LM's own ``num_retries``.
        prices: Over DSPy's own.
    """

    timeout_s: float | None = 120.0
    max_retries: int | None = None
    prices: Prices | None = None

    @classmethod
    def of(cls, trace: TraceConfig) -> "CallSettings":
        """Those of a configuration."""
        prices = {name: Price(each.input, each.output) for name, each in trace.prices.items()}
        return cls(trace.call_timeout_s, trace.max_retries, prices)


@dataclass
class _Attempts:
    """The attempts of one call."""

    ask: Ask
    max_retries: int
    number: int = 0
    outages: int | None = None

    def permitted(self, permit: Permit) -> None:
        # What failed because the teacher was down is not held against the call.
        if self.outages is not None and permit.outages > self.outages:
            self.number = 0
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
        attempts = self._attempts(lm, requests)
        while True:
            with self._stoppable():
                permit = self._gate.enter(attempts.ask)
            attempts.permitted(permit)
            start = time.monotonic()
            try:
                with self._lane(lm) as timeout_s:
                    outputs, entries = attempt(timeout_s)
            except Exception as error:
                time.sleep(self._failed(attempts, permit, error, time.monotonic() - start))
                continue
            except BaseException:
                self._gate.leave(permit, Outcome(Ended.OTHER))
                raise
            self._answered(lm, permit, entries)
            return outputs

    async def aconduct(self, lm: dspy.BaseLM, requests: int, attempt: AsyncAttempt) -> object:
        """Make one call on an event loop."""
        attempts = self._attempts(lm, requests)
        while True:
            with self._stoppable():
                permit = await self._gate.aenter(attempts.ask)
            attempts.permitted(permit)
            start = time.monotonic()
            try:
                with self._lane(lm) as timeout_s:
                    outputs, entries = await attempt(timeout_s)
            except Exception as error:
                wait_s = self._failed(attempts, permit, error, time.monotonic() - start)
                await asyncio.sleep(wait_s)
                continue
            except BaseException:
                self._gate.leave(permit, Outcome(Ended.OTHER))
                raise
            self._answered(lm, permit, entries)
            return outputs

    def _attempts(self, lm: dspy.BaseLM, requests: int) -> _Attempts:
        given = self._settings.max_retries
        return _Attempts(Ask(lm.model, requests), lm.max_retries if given is None else given)

    def _answered(self, lm: dspy.BaseLM, permit: Permit, entries: list[Entry]) -> None:
        usages = [entry_usage(entry, self._settings.prices, is_cached(lm)) for entry in entries]
        usage = total_usage(usages)
        tokens = (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
        self._gate.leave(permit, Outcome(Ended.ANSWERED, tokens, usage.cost_usd))
        for each in usages:
            self._record(each)

    def _failed(
        self, attempts: _Attempts, permit: Permit, error: Exception, took_s: float
    ) -> float:
        """Seconds after which to try again; raises where not to."""
        failure = _failure(error, took_s, self._settings.timeout_s)
        ended = failure.ended
        # What will not be tried again must not hold up others that will: the teacher may be up.
        if attempts.max_retries == 0 and ended in (Ended.DOWN, Ended.TIMED_OUT):
            ended = Ended.OTHER
        self._gate.leave(permit, Outcome(ended, retry_after_s=failure.retry_after_s))
        match decide(failure, attempts.number, attempts.max_retries, random.random):
            case StopAll():
                unusable = TeacherUnusable(f"{type(error).__name__}: {error}")
                self._failed_for_good(unusable)
                raise unusable from error
            case GiveUp():
                self._failed_for_good(error)
                raise error
            case Retry(after_s):
                attempts.number += 1
                return after_s

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        try:
            yield
        except Stopped as stopped:
            kind, message = _REFUSALS[stopped.stop]
            refusal = kind(message)
            self._failed_for_good(refusal)
            raise refusal from stopped
        except CallPrevented as prevented:
            self._failed_for_good(prevented)
            raise

    @contextlib.contextmanager
    def _lane(self, lm: dspy.BaseLM) -> Iterator[float | None]:
        """The attempt's timeout; a little longer for each client that is in full use.

        DSPy keeps an HTTP client for each timeout, so these are different clients.
        """
        number = 0
        with _lanes_lock:
            lanes = _lanes.setdefault(lm.model, Counter())
            # DSPy's cache goes by all options of a call.
            while lanes[number] >= LANE and not is_cached(lm):
                number += 1
            lanes[number] += 1
        try:
            timeout_s = self._settings.timeout_s
            yield None if timeout_s is None else timeout_s + number * LANE_STEP_S
        finally:
            with _lanes_lock:
                lanes[number] -= 1


def _failure(error: Exception, took_s: float, timeout_s: float | None) -> CallFailure:
    ended = Ended(lm_failure(error))
    # To DSPy's own client a reply that does not come is a broken connection.
    if ended is Ended.DOWN and timeout_s is not None and took_s >= timeout_s:
        ended = Ended.TIMED_OUT
    return CallFailure(ended, retry_after_s(error))
