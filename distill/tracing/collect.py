"""Runs a task over examples on Ray actors, durably: the dispatcher.

Each actor keeps a bounded number of examples in flight and writes its traces to the store
itself; only then does it acknowledge them. The driver holds ids and counts. Evaluation is
this with another LM, so it goes through here as well.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from distill.tracing.actor import Acknowledgement, Assignment, outcome_of
from distill.tracing.collection import Collection
from distill.tracing.governor import governing
from distill.tracing.limits import Counts, explain, should_stop, too_many_failed
from distill.tracing.metrics import TraceMetrics
from distill.tracing.permits import Stop
from distill.tracing.pool import Landed, Pool, Worker
from distill.tracing.trace import Failure, FailureKind, Trace, Usage, rejection
from distill.tracing.work import Outcome, Unit, Work
from serve.errors import BudgetExceeded, TracingError

logger = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW = 3
"""For each actor: so many deaths, and nothing finished between them, end the run."""


OnProgress = Callable[[Counts, int, int], None]


def collect(job: Collection, on_progress: OnProgress) -> None:
    """Trace what the store does not hold yet; everything acknowledged is durable.

    Args:
        job: What to trace.
        on_progress: Called with counts, new teacher calls, and the total of runs.

    Raises:
        BudgetExceeded: The budget is used up.
        TracingError: Too much failed, the teacher cannot be used, or actors keep dying.
        TraceStoreError: The store is damaged, or cannot be written.
        StudentError: The teacher is to be served, and does not come to answer.
    """
    # A judge may never be asked; a teacher that is no more than that is served once it is.
    absent = job.service.lm if job.service and job.lm.judge else None
    stopped, counts = _trace(job, on_progress, absent)
    if stopped is Stop.ABSENT and job.service:
        job = replace(job, lm=job.service.beside(job.lm))
        stopped, counts = _trace(job, on_progress, None)
    if stopped is Stop.BUDGET:
        raise BudgetExceeded(explain(stopped, counts, job.limits))
    if stopped:
        raise TracingError(explain(stopped, counts, job.limits))


def _trace(
    job: Collection, on_progress: OnProgress, absent: str | None
) -> tuple[Stop | None, Counts]:
    """Trace what is left, until there is nothing or a limit says stop; ``absent`` as in Bounds."""
    work = job.work()
    counts = _resume(job, work)
    on_progress(counts, 0, work.total)
    if not work.remaining:
        return None, counts
    with contextlib.ExitStack() as stack:
        if job.service and not absent:
            stack.enter_context(job.service.running())
        bounds = replace(job.limits.after(counts.cost_usd), absent=absent)
        beacon = stack.enter_context(job.store.beacon())
        governor = stack.enter_context(governing(job.store.uri, bounds))
        assignment = Assignment(
            task=job.task.dumps(),
            lm=job.lm,
            concurrency=job.concurrency,
            store=job.store.uri,
            beacon=beacon,
            threshold=job.threshold,
            governor=governor,
            calls=job.calls,
        )
        metrics = stack.enter_context(TraceMetrics(job.run, job.stage))
        pool = stack.enter_context(Pool(assignment, job.actors, job.max_actors or job.actors))
        return _Dispatcher(job, work, counts, pool, metrics, on_progress).run(), counts


def _resume(job: Collection, work: Work) -> Counts:
    """Note in ``work`` what is done; left to do is what is new, and failures worth a retry."""
    counts, spending = Counts(), job.spending()
    failures: dict[str, Failure] = {}
    alike: dict[tuple[FailureKind, str], Failure] = {}
    has_metric = job.task.metric is not None
    # Whether a hint is due is for the metric to say as it is now.
    for trace in job.traces(spending) if job.hints else job.records(spending):
        if work.is_finished(trace.key):
            continue
        if trace.failure and trace.failure.kind is FailureKind.PREVENTED:
            continue
        if trace.failure:
            kind = (trace.failure.kind, trace.failure.type)
            if trace.key not in failures or trace.failure.is_final:
                failures[trace.key] = alike.setdefault(kind, trace.failure)
            continue
        failures.pop(trace.key, None)
        work.finish(trace.key, outcome_of(trace, has_metric, job.threshold))
        counts.add(None, None)
    counts.cost_usd = spending.cost_usd
    _finish_failed(job, work, counts, failures)
    return counts


def _finish_failed(
    job: Collection, work: Work, counts: Counts, failures: Mapping[str, Failure]
) -> None:
    """Note which failures are final."""
    # A run that failures stopped is started again because their cause was mended.
    done = counts.finished + len(failures)
    if not counts.finished or too_many_failed(len(failures), done, job.limits, work.total):
        return
    for key, failure in failures.items():
        if failure.is_final:
            work.finish(key, Outcome.REJECTED)
            counts.add(failure, None)


class _Dispatcher:
    """Hands units to actors, a bounded window at a time, until done or stopped."""

    def __init__(
        self,
        job: Collection,
        work: Work,
        counts: Counts,
        pool: Pool,
        metrics: TraceMetrics,
        on_progress: OnProgress,
    ) -> None:
        self._job, self._work, self._counts, self._pool = job, work, counts, pool
        self._metrics, self._on_progress = metrics, on_progress
        self._calls = 0
        self._deaths = 0

    def run(self) -> Stop | None:
        """Dispatch until nothing is left, or until a limit says stop."""
        stopped = self._limit()
        while self._pool.num_in_flight or (self._work.remaining and not stopped):
            self._pool.resize(0 if stopped else self._work.remaining)
            for worker, room in self._pool.rooms(self._work.remaining):
                units = [] if stopped else self._choose(worker, room)
                if units or worker.units:
                    worker.give(units)
            self._metrics.in_flight(self._pool.num_running)
            for landed in self._pool.wait():
                self._land(landed)
            stopped = stopped or self._limit()
            self._on_progress(self._counts, self._calls, self._work.total)
        return stopped

    def _choose(self, worker: Worker, room: int) -> list[Unit]:
        """What a worker is given next."""
        units: list[Unit] = []
        held = list(worker.units)
        while len(units) < room:
            unit = self._work.take(held)
            if unit is None:
                break
            units.append(unit)
            held.append(unit.key)
        return units

    def _limit(self) -> Stop | None:
        return should_stop(self._counts, self._job.limits, self._work.total)

    def _land(self, landed: Landed) -> None:
        if landed.lost is not None:
            self._lose(landed)
        for acknowledged in landed.durable:
            del landed.worker.units[acknowledged.key]
            self._deaths = 0
            self._acknowledge(acknowledged)

    def _acknowledge(self, acknowledged: Acknowledgement) -> None:
        self._work.finish(acknowledged.key, acknowledged.outcome)
        self._calls += acknowledged.calls
        self._counts.add(acknowledged.failure, acknowledged.cost_usd)
        self._counts.tokens += acknowledged.tokens
        self._metrics.ended(acknowledged.rejected, acknowledged.usages)

    def _lose(self, landed: Landed) -> None:
        # The pool replaces the actor; what was not durable runs again.
        self._deaths += 1
        units = landed.worker.units
        logger.warning("An actor died with %d examples in flight: %s", len(units), landed.lost)
        if self._deaths > MAX_DEATHS_IN_A_ROW * max(len(self._pool.workers), self._job.actors):
            raise TracingError(
                f"Tracing actors keep dying: {landed.lost}. What was traced is kept; look at the "
                "logs for the cause (memory is the usual one) and run the same command again."
            ) from landed.lost
        for unit in units.values():
            if not self._work.put_back(unit.key):
                self._give_up(unit)

    def _give_up(self, unit: Unit) -> None:
        """Record an example whose process died each time it was run."""
        failure = Failure(FailureKind.PROGRAM, "ActorDied", "the process that ran it died")
        trace = Trace(
            unit.key,
            unit.example_id,
            calls=(),
            prediction=None,
            usage=Usage(),
            latency_s=0.0,
            failure=failure,
            sample=unit.variant.sample,
            hinted=unit.variant.hinted,
        )
        self._job.store.writer().append([trace.to_json()])
        self._work.finish(unit.key, Outcome.REJECTED)
        self._counts.add(failure, None)
        self._metrics.ended(rejection(trace, has_metric=False, threshold=None), {})
