"""The actor that traces: a thin shell around ``Tracer``, a bounded number of units at a time.

It is handed units, a few more than it runs at once, makes each one's trace durable as soon as
it is there, and only then acknowledges it. Which units it gets is for ``pool`` and ``collect``.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dspy
import ray

from distill import secrets
from distill.programs import Task
from distill.tracing.conductor import CallSettings
from distill.tracing.governor import gate_to
from distill.tracing.spending import cost_usd, paid
from distill.tracing.store import TraceStore
from distill.tracing.trace import (
    Failure,
    FailureKind,
    Trace,
    Usage,
    passes,
    rejection,
)
from distill.tracing.tracer import Tracer
from distill.tracing.work import Outcome, Unit
from serve.errors import TraceStoreError
from serve.programs import set_up

ANSWER_AT_LEAST_EVERY_S = 1.0


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
class Assignment:
    """What an actor does for as long as it lives.

    Attributes:
        task: The task, as ``Task.dumps`` wrote it.
        lm: Answers.
        concurrency: Units in flight, at most.
        store: The URI of the store.
        beacon: What the actor has to see there.
        threshold: See ``trace.passes``.
        governor: The run's, which every call of an LM is asked of.
        calls: How LMs are called.
    """

    task: bytes
    lm: LmSpec
    concurrency: int
    store: str
    beacon: str
    threshold: float | None
    governor: Any
    calls: CallSettings


@dataclass(frozen=True)
class Acknowledgement:
    """What an actor says of a durable trace."""

    key: str
    failure: Failure | None
    outcome: Outcome
    calls: int
    tokens: int
    cost_usd: float
    rejected: str | None
    usages: Mapping[str, Usage]


def outcome_of(trace: Trace, has_metric: bool, threshold: float | None) -> Outcome:
    """What became of the unit that this is the trace of."""
    if trace.failure:
        by_teacher = trace.failure.kind in (FailureKind.TEACHER, FailureKind.PREVENTED)
        return Outcome.UNANSWERED if by_teacher else Outcome.REJECTED
    passed = not has_metric or passes(trace.score, threshold)
    return Outcome.PASSED if passed else Outcome.REJECTED


def _never_ran(trace: Trace) -> bool:
    """Whether nothing was paid or learned that is worth keeping."""
    prevented = trace.failure is not None and trace.failure.kind is FailureKind.PREVENTED
    return prevented and not trace.spent.calls


class TraceActor:
    """Traces, makes durable, acknowledges.

    Args:
        payload: A pickled ``Assignment``.
        import_paths: Where the user's program is imported from.
    """

    def __init__(self, payload: bytes, import_paths: Sequence[str]) -> None:
        # The user's program is imported here by name, from where the driver found it.
        sys.path.extend(path for path in import_paths if path not in sys.path)
        self._payload = payload
        self._running: set[asyncio.Task[None]] = set()
        self._pending: list[tuple[Trace, asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._durable: list[Acknowledgement] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    async def start(self, environment: Mapping[str, str]) -> None:
        """Make ready what the first unit needs.

        Args:
            environment: Variables that the payload needs; API keys are nowhere else.

        Raises:
            TraceStoreError: The store is another one here, or cannot be written.
            ConfigurationError: The setup hook raised.
        """
        # Not in __init__, which runs outside the event loop that an LM may need, and whose
        # errors Ray takes for the actor's death.
        os.environ.update(environment)
        self._job: Assignment = secrets.loads(self._payload)
        self._slots = asyncio.Semaphore(self._job.concurrency)
        store = TraceStore(self._job.store)
        if not store.sees(self._job.beacon):
            raise TraceStoreError(
                f"storage: {store.uri} is not the same folder on node "
                f"{ray.util.get_node_ip_address()}. Use a folder that all nodes share, or a URI "
                "such as s3://bucket/runs."
            )
        self._writer = store.writer()
        task: Task = secrets.loads(self._job.task)
        if task.setup is not None:
            await set_up(task.program, task.setup)
        self._has_metric = task.metric is not None
        self._tracer = Tracer(
            task,
            self._job.lm.make(),
            judge=self._job.lm.judge() if self._job.lm.judge else None,
            concurrency=self._job.concurrency,
            override_lms=self._job.lm.override_lms,
            gate=gate_to(self._job.governor),
            calls=self._job.calls,
        )

    async def exchange(self, units: Sequence[Unit]) -> list[Acknowledgement]:
        """Begin these units; returns what has become durable since the last time.

        Waits until there is something to return, but not for ever.

        Raises:
            Exception: What keeps this actor from going on.
        """
        for unit in units:
            task = asyncio.create_task(self._trace(unit))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        try:
            await asyncio.wait_for(self._news.wait(), ANSWER_AT_LEAST_EVERY_S)
        except TimeoutError:
            return []
        self._news.clear()
        if self._error:
            raise self._error
        durable, self._durable = self._durable, []
        return durable

    async def _trace(self, unit: Unit) -> None:
        try:
            # Held until the trace is durable, so that no more than the slots can be lost.
            async with self._slots:
                trace = await self._tracer.trace(unit.key, unit.example, unit.variant)
                trace = replace(trace, example_id=unit.example_id)
                if not _never_ran(trace):
                    await self._commit(trace)
        # A tracer keeps what the program raises; what gets here would be lost in the task.
        except Exception as error:
            self._error = self._error or error
        else:
            self._durable.append(self._acknowledgement(trace))
        self._news.set()

    def _acknowledgement(self, trace: Trace) -> Acknowledgement:
        spent = trace.spent
        return Acknowledgement(
            key=trace.key,
            failure=trace.failure,
            outcome=outcome_of(trace, self._has_metric, self._job.threshold),
            calls=spent.calls,
            tokens=(spent.prompt_tokens or 0) + (spent.completion_tokens or 0),
            cost_usd=cost_usd(paid(trace, self._job.lm.override_lms)),
            rejected=rejection(trace, self._has_metric, self._job.threshold),
            usages=trace.usages,
        )

    async def _commit(self, trace: Trace) -> None:
        # What finishes while one write is under way goes into the next: one sync for many.
        done = asyncio.get_running_loop().create_future()
        self._pending.append((trace, done))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._write_pending())
        await done

    async def _write_pending(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            records = [trace.to_json() for trace, _ in batch]
            try:
                await asyncio.to_thread(self._writer.append, records)
            except Exception as error:
                for _, done in batch:
                    done.set_exception(error)
                continue
            for _, done in batch:
                done.set_result(None)
