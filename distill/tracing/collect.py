"""Runs a task over examples on Ray actors, durably: the dispatcher.

Each actor keeps a bounded number of examples in flight and writes its traces to the store
itself; only then does it acknowledge them. The driver holds ids and counts. Evaluation is
this with another LM, so it goes through here as well.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import dspy

from distill.datasets import distinct, example_id
from distill.programs import Task, fingerprint, program_fingerprint
from distill.tracing.actor import Acknowledgement, Assignment, LmSpec, outcome_of
from distill.tracing.limits import Counts, Limits, StopReason, explain, should_stop, too_many_failed
from distill.tracing.pool import Landed, Pool, Worker
from distill.tracing.store import TraceStore
from distill.tracing.trace import Failure, FailureKind, Trace, Usage
from distill.tracing.tracer import with_current_score
from distill.tracing.work import Outcome, Unit, Work
from serve.errors import BudgetExceeded, TracingError

logger = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW = 3
"""For each actor: so many deaths, and nothing finished between them, end the run."""


@dataclass(frozen=True)
class Collection:
    """A task to run over examples with an LM, and how.

    Attributes:
        actors: How many there are at least.
        concurrency: Calls of the program in flight for each actor.
        max_actors: How many there may be; None is no more than ``actors``.
        samples: Runs of each example.
        hints: Whether an example that no run of passed gets one more, with the label as a hint.
        threshold: See ``trace.passes``.
    """

    task: Task
    lm: LmSpec
    examples: Sequence[dspy.Example]
    store: TraceStore
    actors: int
    concurrency: int
    limits: Limits
    max_actors: int | None = None
    samples: int = 1
    hints: bool = False
    threshold: float | None = None

    def work(self) -> Work:
        """The units of it, none of them done."""
        context = fingerprint([program_fingerprint(self.task), self.lm.identity])
        return Work(distinct(self.examples), context, self.samples, self.hints)

    def keys(self) -> Mapping[str, int]:
        """The keys of its traces, those of one example together."""
        return self.work().keys

    def traces(self) -> Iterator[Trace]:
        """What the store holds of it, by example and then sample, scored by today's metric."""
        work = self.work()
        judge = (self.lm.judge or self.lm.make)()
        for trace in self.store.read(work.keys):
            yield with_current_score(trace, work.example(trace.key), self.task, judge)


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
    """
    work = job.work()
    counts = _resume(job, work)
    on_progress(counts, 0, work.total)
    if not work.remaining:
        return
    with job.store.beacon() as beacon:
        assignment = Assignment(
            task=job.task.dumps(),
            lm=job.lm,
            concurrency=job.concurrency,
            store=job.store.uri,
            beacon=beacon,
            threshold=job.threshold,
        )
        with Pool(assignment, job.actors, job.max_actors or job.actors) as pool:
            stopped = _Dispatcher(job, work, counts, pool, on_progress).run()
    if stopped is StopReason.BUDGET:
        raise BudgetExceeded(explain(stopped, counts, job.limits))
    if stopped:
        raise TracingError(explain(stopped, counts, job.limits))


def _resume(job: Collection, work: Work) -> Counts:
    """Note in ``work`` what is done; left to do is what is new, and failures worth a retry."""
    counts = Counts()
    failures: dict[str, Failure] = {}
    alike: dict[tuple[FailureKind, str], Failure] = {}
    judge = (job.lm.judge or job.lm.make)() if job.hints else None
    for trace in job.store.scan():
        if trace.key not in work.keys:
            continue
        counts.cost_usd += trace.usage.cost_usd or 0.0
        if work.is_finished(trace.key):
            continue
        if trace.failure:
            kind = (trace.failure.kind, trace.failure.type)
            failures[trace.key] = alike.setdefault(kind, trace.failure)
            continue
        failures.pop(trace.key, None)
        if judge is not None:
            # Whether a hint is due is for the metric to say as it is now.
            trace = with_current_score(trace, work.example(trace.key), job.task, judge)
        has_metric = job.task.metric is not None
        work.finish(trace.key, outcome_of(trace, has_metric, job.threshold))
        counts.add(None, None)
    # A run that failures stopped is started again because their cause was mended.
    done = counts.finished + len(failures)
    stopped = too_many_failed(len(failures), done, job.limits, work.total)
    if not stopped and counts.finished:
        for key, failure in failures.items():
            # The teacher could not be reached then; a program that raised will raise again.
            if failure.kind is not FailureKind.TEACHER:
                work.finish(key, Outcome.REJECTED)
                counts.add(failure, None)
    return counts


class _Dispatcher:
    """Hands units to actors, a bounded window at a time, until done or stopped."""

    def __init__(
        self, job: Collection, work: Work, counts: Counts, pool: Pool, on_progress: OnProgress
    ) -> None:
        self._job, self._work, self._counts, self._pool = job, work, counts, pool
        self._on_progress = on_progress
        self._calls = 0
        self._deaths = 0

    def run(self) -> StopReason | None:
        """Dispatch until nothing is left, or until a limit says stop."""
        stopped = None
        while self._pool.num_in_flight or (self._work.remaining and not stopped):
            self._pool.resize(0 if stopped else self._work.remaining)
            for worker, room in self._pool.rooms(self._work.remaining):
                units, stopped = self._choose(worker, room, stopped)
                if units or worker.units:
                    worker.give(units)
            for landed in self._pool.wait():
                self._land(landed)
            stopped = stopped or self._limit(0)
            self._on_progress(self._counts, self._calls, self._work.total)
        return stopped

    def _choose(
        self, worker: Worker, room: int, stopped: StopReason | None
    ) -> tuple[list[Unit], StopReason | None]:
        """What a worker is given next, and whether a limit says stop."""
        units: list[Unit] = []
        held = list(worker.units)
        while len(units) < room and not stopped:
            stopped = self._limit(len(units))
            unit = None if stopped else self._work.take(held)
            if unit is None:
                break
            units.append(unit)
            held.append(unit.key)
        return units, stopped

    def _limit(self, num_about_to_start: int) -> StopReason | None:
        in_flight = self._pool.num_in_flight + num_about_to_start
        return should_stop(self._counts, self._job.limits, in_flight, self._work.total)

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
        self._counts.unpriced |= acknowledged.calls > 0 and acknowledged.cost_usd is None

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
            example_id(unit.example),
            calls=(),
            prediction=None,
            usage=Usage(),
            latency_s=0.0,
            failure=failure,
            sample=unit.sample,
            hinted=unit.hinted,
        )
        self._job.store.writer().append([trace.to_json()])
        self._work.finish(unit.key, Outcome.REJECTED)
        self._counts.add(failure, None)
