"""The limiter of a run as a Ray actor, which all tracing actors ask.

A thin shell: what may be called when is ``limiter``; asking in batches is ``gate``.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distill import cluster
from distill.tracing.gate import FLUSH_S, Gate, Reply, Report
from distill.tracing.limiter import Limiter
from distill.tracing.permits import Bounds, Outcome, Permit, Wait
from serve.errors import CallPrevented, DistillError

logger = logging.getLogger(__name__)

SILENT_S = 15.0
"""A process that says nothing for so long is dead; one that has calls in flight speaks up."""
MESSAGES_PER_S = 200
"""What all processes together send that could wait; this one could bear several times that."""
LONGEST_WAIT_S = 1.0
"""Room may come sooner than it is told: calls end, and permits come back."""
LONG_PAUSE_S = 60.0


class Governor:
    """Answers the reports of all processes of a run.

    Args:
        bounds: Those of the first job.
        clock: Tells seconds.
    """

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = Limiter(bounds)
        self._clock = clock
        self._seen: dict[str, float] = {}
        self._calls: dict[str, dict[int, int]] = {}
        self._waiting: set[str] = set()

    def begin(self, bounds: Bounds) -> None:
        """Start a job of the run."""
        self._limiter.begin(bounds)

    def exchange(self, report: Report) -> Reply:
        """Take note of what a process says, and answer its asks."""
        now, holder = self._clock(), report.holder
        # In the order in which they were last seen.
        self._seen.pop(holder, None)
        self._seen[holder] = now
        self._take_note(now, report)
        self._forget_dead(now)
        permits: list[Permit | None] = []
        waits = []
        for ask in report.asks:
            answer = self._limiter.ask(now, ask)
            permits.append(answer if isinstance(answer, Permit) else None)
            if isinstance(answer, Permit):
                self._calls[holder][answer.id] = answer.id
            elif isinstance(answer, Wait):
                waits.append(answer.seconds)
        self._waiting.discard(holder)
        if waits:
            self._waiting.add(holder)
        return Reply(
            permits,
            wait_s=max(min([LONGEST_WAIT_S, *waits]), len(self._waiting) / MESSAGES_PER_S),
            pace_s=max(FLUSH_S, len(self._seen) / MESSAGES_PER_S),
            refusal=self._limiter.refusal,
            free=self._limiter.free(now),
        )

    def _take_note(self, now: float, report: Report) -> None:
        """Translate the process's names of its calls to the limiter's."""
        calls = self._calls.setdefault(report.holder, {})
        for number, ask in report.begun:
            calls[number] = self._limiter.admit(ask)
        for number in report.sent:
            if number in calls:
                self._limiter.sent(now, calls[number])
        for number in report.returned:
            if number in calls:
                self._limiter.give_back(calls.pop(number))
        for number, outcome in report.outcomes:
            self._finish(now, calls.pop(number, None), outcome)

    def _finish(self, now: float, call: int | None, outcome: Outcome) -> None:
        paused_s = self._limiter.finish(now, call, outcome)
        if paused_s > LONG_PAUSE_S:
            until = datetime.now() + timedelta(seconds=outcome.retry_after_s or 0.0)
            logger.warning(
                "The teacher wants to be left alone until %s (Retry-After); tracing goes on then.",
                f"{until:%Y-%m-%d %H:%M:%S}",
            )

    def _forget_dead(self, now: float) -> None:
        for holder, seen in list(self._seen.items()):
            if now - seen <= SILENT_S:
                return
            for call in self._calls.pop(holder).values():
                self._limiter.lose(now, call)
            del self._seen[holder]
            self._waiting.discard(holder)


_lasting: dict[tuple[str, str, str], Any] = {}
"""Governors that outlive their job; an actor that nobody refers to is taken down by Ray."""


@contextlib.contextmanager
def governing(run: str, bounds: Bounds) -> Iterator[Any]:
    """The governor of a run, for one job of it.

    Where there are limits per minute it outlives the job, so that the calls of one job count
    in the next one's minute; this driver's end is its end.

    Args:
        run: What names the run.
        bounds: Those of the job.
    """
    if bounds.requests_per_minute is None and bounds.tokens_per_minute is None:
        governor = _start(bounds)
        try:
            yield governor
        finally:
            ray.kill(governor)
        return
    driver = ray.get_runtime_context()
    # One driver may connect to several clusters, one after the other.
    name = (run, driver.get_node_id(), driver.get_job_id())
    try:
        ray.get(_lasting[name].begin.remote(bounds))
    except (KeyError, RayActorError):
        # There is none yet, or none any more.
        _lasting[name] = _start(bounds)
    yield _lasting[name]


def _start(bounds: Bounds) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(Governor).options(num_cpus=0, scheduling_strategy=here)
    return remote.remote(bounds)


def gate_to(governor: Any) -> Gate:
    """A process's gate, which asks the governor."""
    return Gate(lambda report: _exchange(governor, report))


@contextlib.contextmanager
def gate_when_asked(
    run: str,
    bounds: Callable[[], Bounds],
    serving: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Gate]:
    """A gate for calls that there may be: the first one connects to Ray and to the governor.

    Args:
        run: What names the run.
        bounds: Tells those of the job.
        serving: Has whatever is called be there, for as long as the gate is.
    """
    starting, over = threading.Lock(), threading.Event()
    with contextlib.ExitStack() as stack:

        @functools.cache
        def governor() -> Any:
            with starting:
                if over.is_set():
                    raise CallPrevented("The run's calls have ended.")
                stack.enter_context(cluster.connected())
                try:
                    stack.enter_context(serving())
                except DistillError as error:
                    # What asks must not take it for an answer, such as a metric's error.
                    raise CallPrevented(str(error)) from error
                return stack.enter_context(governing(run, bounds()))

        try:
            yield Gate(lambda report: _exchange(governor(), report))
        finally:
            # Only what has come to be there can be stopped.
            with starting:
                over.set()


def _exchange(governor: Any, report: Report) -> Reply:
    # Not ray.get, which in an async actor warns of blocking the loop; this is a thread.
    reply: Reply = governor.exchange.remote(report).future().result()
    return reply
