"""The limiter of a run as a Ray actor, which all tracing actors ask.

A thin shell: what may be called when is ``limiter``; asking in batches is ``gate``.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distill import cluster
from distill.tracing.gate import Gate, Reply, Report
from distill.tracing.limiter import Limiter
from distill.tracing.permits import Bounds, Permit, Stop, Wait
from serve.errors import CallPrevented, DistillError

SILENT_S = 15.0
"""A process that says nothing for so long is dead; one that holds permits speaks up."""


class Governor:
    """Answers the reports of all processes of a run.

    Args:
        bounds: Those of the first job.
        clock: Tells seconds.
    """

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = Limiter(bounds)
        self._clock = clock
        self._held: dict[str, set[int]] = {}
        self._seen: dict[str, float] = {}

    def begin(self, bounds: Bounds) -> None:
        """Start a job of the run."""
        self._limiter.begin(bounds)

    def exchange(self, report: Report) -> Reply:
        """Take note of what a process says, and answer its asks."""
        now = self._clock()
        held = self._held.setdefault(report.holder, set())
        self._seen[report.holder] = now
        for permit_id, outcome in report.outcomes:
            held.discard(permit_id)
            self._limiter.finish(now, permit_id, outcome)
        for permit_id in report.returned:
            held.discard(permit_id)
            self._limiter.give_back(now, permit_id)
        self._forget_dead(now)
        permits: list[Permit | None] = []
        waits, stopped = [], None
        for ask in report.asks:
            answer = self._limiter.ask(now, ask)
            permits.append(answer if isinstance(answer, Permit) else None)
            if isinstance(answer, Permit):
                held.add(answer.id)
            elif isinstance(answer, Wait):
                waits.append(answer.seconds)
            elif isinstance(answer, Stop):
                stopped = answer
        return Reply(permits, min(waits, default=0.0), stopped)

    def _forget_dead(self, now: float) -> None:
        for holder in [name for name, seen in self._seen.items() if now - seen > SILENT_S]:
            for permit_id in self._held.pop(holder):
                self._limiter.give_back(now, permit_id)
            del self._seen[holder]


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
    if name in _lasting:
        ray.get(_lasting[name].begin.remote(bounds))
    else:
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
    with contextlib.ExitStack() as stack:

        @functools.cache
        def governor() -> Any:
            stack.enter_context(cluster.connected())
            try:
                stack.enter_context(serving())
            except DistillError as error:
                # What asks must not take it for an answer, such as a metric's error.
                raise CallPrevented(str(error)) from error
            return stack.enter_context(governing(run, bounds()))

        yield Gate(lambda report: _exchange(governor(), report))


def _exchange(governor: Any, report: Report) -> Reply:
    try:
        # Not ray.get, which in an async actor warns of blocking the loop; this is a thread.
        reply: Reply = governor.exchange.remote(report).future().result()
    except RayError as error:
        raise CallPrevented(f"The run's governor is gone: {error}. Run again.") from error
    return reply
