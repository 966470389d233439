"""Runs a task over examples on Ray actors, durably: the dispatcher and its actor.

Each actor keeps a bounded number of examples in flight and writes its traces to the store
itself; only then does it acknowledge them. The driver holds ids and counts. Evaluation is
this with another LM, so it goes through here as well.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import dspy
import ray
from ray.exceptions import RayActorError, RayTaskError

from distill.datasets import distinct
from distill.fingerprints import fingerprint
from distill.programs import Task, program_fingerprint
from distill.tracing.conductor import CallSettings
from distill.tracing.governor import gate_to, governing
from distill.tracing.limits import Counts, Limits, StopReason, explain, should_stop, too_many_failed
from distill.tracing.spending import cost_usd, paid, paid_by_predictor
from distill.tracing.store import TraceStore
from distill.tracing.trace import Failure, FailureKind, Trace, total_usage
from distill.tracing.tracer import Tracer
from serve.errors import BudgetExceeded, TracingError

logger = logging.getLogger(__name__)

MAX_LOST_ACTORS = 3
POLL_S = 0.5
SAY_AFTER_S = 10.0


@dataclass(frozen=True)
class LmSpec:
    """An LM to answer with: how to make it in an actor, and what names it.

    Attributes:
        make: Called once in each actor, inside its event loop.
        identity: JSON values; a change of them makes a trace a different one.
        override_lms: Whether it takes the place of predictors' own LMs.
        judge: Makes the LM that a metric finds as ``dspy.settings.lm``; None is the same.
        num_cpus, num_gpus: What one actor of it asks Ray for.
    """

    make: Callable[[], dspy.BaseLM]
    identity: Any
    override_lms: bool = False
    judge: Callable[[], dspy.BaseLM] | None = None
    num_cpus: float = 1
    num_gpus: float = 0


@dataclass(frozen=True)
class Collection:
    """A task to run over examples with an LM, and how."""

    task: Task
    lm: LmSpec
    examples: Sequence[dspy.Example]
    store: TraceStore
    actors: int
    concurrency: int
    limits: Limits
    calls: CallSettings = field(default_factory=CallSettings)

    def keys(self) -> dict[str, dspy.Example]:
        """Examples by trace key, equal ones once."""
        context = fingerprint([program_fingerprint(self.task), self.lm.identity])
        return {
            fingerprint([identity, context]): example
            for identity, example in distinct(self.examples).items()
        }


@dataclass(frozen=True)
class Acknowledgement:
    """What an actor says of a durable trace."""

    key: str
    failure: Failure | None
    calls: int
    tokens: int
    cost_usd: float | None
    unpriced: bool


OnProgress = Callable[[Counts, int, int], None]


def collect(job: Collection, on_progress: OnProgress) -> None:
    """Trace what the store does not hold yet; everything acknowledged is durable.

    Args:
        job: What to trace.
        on_progress: Called with counts, new teacher calls, and the total of examples.

    Raises:
        BudgetExceeded: The budget is used up.
        TracingError: Too much failed, the teacher cannot be used, or actors keep dying.
    """
    examples = job.keys()
    counts, todo = _resume(job, examples)
    if job.limits.budget_usd is not None:
        # Of first tries as well, which later ones have replaced.
        records = (trace for trace in job.store.scan() if trace.key in examples)
        counts.cost_usd = cost_usd(paid_by_predictor(records, job.lm.override_lms))
    on_progress(counts, 0, len(examples))
    if not todo:
        return
    dispatcher = _Dispatcher(job, examples, counts, todo, on_progress)
    bounds = job.limits.bounds(counts.cost_usd)
    with governing(job.store.uri, bounds) as governor, _actors(job, governor) as actors:
        stopped = dispatcher.run(actors)
    if stopped is StopReason.BUDGET:
        raise BudgetExceeded(explain(stopped, counts, job.limits))
    if stopped:
        raise TracingError(explain(stopped, counts, job.limits))


def _resume(job: Collection, examples: Mapping[str, Any]) -> tuple[Counts, deque[str]]:
    """What is done, and which examples are to do: the new ones and failures worth a retry."""
    done = job.store.latest(examples)
    failures = [trace for trace in done.values() if trace.failure]
    # A run that failures stopped is started again because their cause was mended.
    stopped = too_many_failed(len(failures), len(done), job.limits, len(examples))
    retry_all = stopped or len(failures) == len(done)
    repeat = {trace.key for trace in failures if retry_all or _is_passing(trace)}
    counts = Counts()
    for trace in done.values():
        if trace.key not in repeat:
            counts.add(trace.failure, trace.spent.cost_usd)
        else:
            counts.cost_usd += trace.spent.cost_usd or 0.0
    return counts, deque(key for key in examples if key not in done or key in repeat)


def _is_passing(trace: Trace) -> bool:
    # The teacher could not be reached then; a program that raised will raise again.
    return trace.failure is not None and trace.failure.kind is FailureKind.TEACHER


class _Dispatcher:
    """Hands examples to actors, a bounded window at a time, until done or stopped."""

    def __init__(
        self,
        job: Collection,
        examples: Mapping[str, dspy.Example],
        counts: Counts,
        todo: deque[str],
        on_progress: OnProgress,
    ) -> None:
        self._job, self._examples = job, examples
        self._counts, self._todo = counts, todo
        self._on_progress = on_progress
        self._calls = 0
        self._lost = 0
        self._flights: dict[Any, tuple[str, Any]] = {}
        self._starting: dict[Any, Any] = {}
        self._since, self._said = time.monotonic(), False

    def run(self, actors: Sequence[Any]) -> StopReason | None:
        """Dispatch until nothing is left, or until a limit says stop."""
        stopped = None
        idle: deque[Any] = deque()
        self._starting = {actor.ready.remote(): actor for actor in actors}
        while self._flights or (self._todo and not stopped):
            for actor in self._started():
                idle.extend([actor] * self._job.concurrency)
            while self._todo and idle and not stopped:
                stopped = self._limit()
                if not stopped:
                    self._launch(self._todo.popleft(), idle.popleft())
            if self._flights:
                idle.extend(self._land())
            stopped = stopped or self._limit()
            self._on_progress(self._counts, self._calls, len(self._examples))
        return stopped

    def _started(self) -> list[Any]:
        """Actors that have come up; others wait for room, which somebody else may hold."""
        # With nothing in flight there is nothing else to wait for.
        timeout = 0 if self._flights else POLL_S
        if not self._starting:
            return []
        if not self._said and not self._flights and time.monotonic() - self._since > SAY_AFTER_S:
            self._said = True
            logger.warning("Waiting for room for tracing actors; the cluster has none to spare.")
        ready, _ = ray.wait(list(self._starting), num_returns=1, timeout=timeout)
        actors = []
        for ref in ready:
            actor = self._starting.pop(ref)
            try:
                ray.get(ref)
                actors.append(actor)
            except RayActorError as error:
                self._count_loss(error)
                self._starting[actor.ready.remote()] = actor
        return actors

    def _limit(self) -> StopReason | None:
        return should_stop(self._counts, self._job.limits, len(self._flights), len(self._examples))

    def _launch(self, key: str, actor: Any) -> None:
        self._flights[actor.trace.remote(key, self._examples[key])] = (key, actor)

    def _land(self) -> list[Any]:
        refs = list(self._flights)
        ray.wait(refs, num_returns=1, timeout=POLL_S)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        freed = []
        for ref in ready:
            key, actor = self._flights.pop(ref)
            freed.append(actor)
            try:
                acknowledged = ray.get(ref)
            except RayActorError as error:
                self._requeue(key, error)
                continue
            except RayTaskError as error:
                cause = error.cause if error.cause is not None else error
                raise TracingError(
                    f"A tracing actor failed: {type(cause).__name__}: {cause}. What was traced is "
                    "kept; mend the cause and run it again."
                ) from error
            self._calls += acknowledged.calls
            self._counts.add(acknowledged.failure, acknowledged.cost_usd)
            self._counts.tokens += acknowledged.tokens
            self._counts.unpriced |= acknowledged.unpriced
        return freed

    def _requeue(self, key: str, error: RayActorError) -> None:
        # Ray restarts the actor; the example was not durable, so it runs again.
        logger.warning("An actor died with example %s in flight: %s", key, error)
        self._count_loss(error)
        self._todo.append(key)

    def _count_loss(self, error: RayActorError) -> None:
        self._lost += 1
        if self._lost > MAX_LOST_ACTORS * self._job.concurrency:
            raise TracingError(
                f"Tracing actors keep dying: {error}. What was traced is kept; look at the logs "
                "for the cause (memory is the usual one) and run it again."
            ) from error


@contextlib.contextmanager
def _actors(job: Collection, governor: Any) -> Iterator[list[Any]]:
    payload = cloudpickle.dumps(
        (job.task.dumps(), job.lm, job.concurrency, job.store.uri, governor, job.calls)
    )
    remote = ray.remote(TraceActor).options(
        num_cpus=job.lm.num_cpus,
        num_gpus=job.lm.num_gpus,
        max_concurrency=job.concurrency + 1,
        max_restarts=MAX_LOST_ACTORS,
    )
    actors = [remote.remote(payload, sys.path) for _ in range(job.actors)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


class TraceActor:
    """The thin shell around a ``Tracer``: traces, makes durable, acknowledges."""

    def __init__(self, payload: bytes, import_paths: Sequence[str]) -> None:
        # The user's program is imported here by name, from where the driver found it.
        sys.path.extend(path for path in import_paths if path not in sys.path)
        self._payload = payload
        self._tracer: Tracer | None = None
        self._pending: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Answers once the actor is up."""

    async def trace(self, key: str, example: dspy.Example) -> Acknowledgement:
        """Trace one example; durable when this returns."""
        if self._tracer is None:
            self._set_up()
        assert self._tracer is not None
        trace = await self._tracer.trace(key, example)
        await self._commit(trace)
        paid_for = total_usage(list(paid(trace, self._ours).values()))
        return Acknowledgement(
            key=key,
            failure=trace.failure,
            calls=trace.spent.calls,
            tokens=(trace.spent.prompt_tokens or 0) + (trace.spent.completion_tokens or 0),
            cost_usd=paid_for.cost_usd,
            unpriced=paid_for.calls > 0 and paid_for.cost_usd is None,
        )

    def _set_up(self) -> None:
        # Not in __init__, which runs outside the event loop that an LM may need.
        task, spec, concurrency, uri, governor, calls = cloudpickle.loads(self._payload)
        self._ours = spec.override_lms
        self._writer = TraceStore(uri).writer()
        self._tracer = Tracer(
            cloudpickle.loads(task),
            spec.make(),
            judge=spec.judge() if spec.judge else None,
            concurrency=concurrency,
            override_lms=spec.override_lms,
            gate=gate_to(governor),
            calls=calls,
        )

    async def _commit(self, trace: Trace) -> None:
        # What finishes while one write is under way goes into the next: one sync for many.
        done = asyncio.get_running_loop().create_future()
        self._pending.append((trace.to_json(), done))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._write_pending())
        await done

    async def _write_pending(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self._writer.append, [trace for trace, _ in batch])
            except Exception as error:
                for _, done in batch:
                    done.set_exception(error)
                continue
            for _, done in batch:
                done.set_result(None)
