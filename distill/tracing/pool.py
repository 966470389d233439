"""The pool of tracing actors: grows, shrinks, and notices which have died.

Actors ask Ray for resources, so one that does not fit yet makes the autoscaler add a node,
and is used once it is up. What they are given to do is for ``collect``.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from distill import secrets
from distill.tracing.actor import Acknowledgement, Assignment, TraceActor
from distill.tracing.work import Unit
from serve.errors import DistillError, TracingError

logger = logging.getLogger(__name__)

POLL_S = 0.5
NONE_UP_AFTER_S = 10.0
STILL_AFTER_S = 300.0


@dataclass(eq=False)
class Worker:
    """An actor as the driver sees it.

    Attributes:
        actor: Its handle.
        answer: What it is asked at the moment; None when it is not.
        is_up: Whether it has started.
        has_finished: Whether it has made anything durable.
        units: What it has in flight, by key.
    """

    actor: Any
    answer: Any
    is_up: bool = False
    has_finished: bool = False
    units: dict[str, Unit] = field(default_factory=dict)

    def give(self, units: Sequence[Unit]) -> None:
        """Begin these units, and ask what has finished."""
        self.units.update((unit.key, unit) for unit in units)
        self.answer = self.actor.exchange.remote(units)


@dataclass(frozen=True)
class Landed:
    """What a worker answered; ``lost`` says why it will not answer again."""

    worker: Worker
    durable: Sequence[Acknowledgement] = ()
    lost: RayError | None = None


class Pool:
    """Actors for one assignment, between so many and so many; a context manager.

    Args:
        assignment: What they do.
        smallest, largest: How many there may be.
    """

    def __init__(self, assignment: Assignment, smallest: int, largest: int) -> None:
        lm = assignment.lm
        self._payload, self._environment = secrets.dumps(assignment), secrets.variables()
        self._remote = ray.remote(TraceActor).options(
            num_cpus=lm.num_cpus, num_gpus=lm.num_gpus, max_concurrency=2
        )
        self._concurrency = assignment.concurrency
        # Held ready, so that no slot of an actor waits for the driver.
        self._ahead = max(1, assignment.concurrency // 4)
        self._smallest, self._largest = smallest, largest
        self._since = time.monotonic()
        self._said_of_up: bool | None = None
        self.workers: list[Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self.workers):
            self._remove(worker)

    @property
    def num_in_flight(self) -> int:
        """Units handed out and not finished."""
        return sum(len(worker.units) for worker in self.workers)

    @property
    def num_running(self) -> int:
        """Those of them that run; an actor holds others ready."""
        return sum(min(len(worker.units), self._concurrency) for worker in self.workers)

    def resize(self, remaining: int) -> None:
        """Fit the pool to the units that are not handed out yet and those in flight."""
        needed = -(-(remaining + self.num_in_flight) // self._concurrency)
        wanted = min(self._largest, max(needed, self._smallest))
        num_up = sum(worker.is_up for worker in self.workers)
        idle = [worker for worker in self.workers if not worker.units]
        idle.sort(key=lambda worker: worker.is_up)
        for worker in idle[: max(len(self.workers) - wanted, 0)]:
            self._remove(worker)
        # A cluster that grows gets its actors step by step; one that cannot is not flooded.
        most = num_up + max(self._smallest, num_up)
        while len(self.workers) < min(wanted, most):
            actor = self._remote.remote(self._payload, sys.path)
            self.workers.append(Worker(actor, actor.start.remote(self._environment)))

    def rooms(self, remaining: int) -> list[tuple[Worker, int]]:
        """The workers that can be given something now, and how many units to each.

        What is left is shared evenly, so that the last units don't wait on one worker.
        """
        up = [worker for worker in self.workers if worker.is_up]
        share = -(-(remaining + self.num_in_flight) // max(len(up), self._smallest))
        rooms = []
        for worker in up:
            # A teacher that refuses everything is not asked more than it must be.
            ahead = self._ahead if worker.has_finished else 0
            room = min(self._concurrency + ahead, share) - len(worker.units)
            rooms += [(worker, room)] if worker.answer is None else []
        return rooms

    def wait(self) -> list[Landed]:
        """What the workers have answered; returns after a while even if they have not.

        Raises:
            DistillError: What keeps an actor from going on.
        """
        asked = {worker.answer: worker for worker in self.workers if worker.answer is not None}
        if not asked:
            return []
        ray.wait(list(asked), num_returns=1, timeout=POLL_S)
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        landed = [self._land(asked[answer]) for answer in ready]
        if any(each.durable for each in landed):
            self._since, self._said_of_up = time.monotonic(), None
        self._say_if_still()
        return landed

    def _say_if_still(self) -> None:
        """Say, once in each silence, what it may come from."""
        up = any(worker.is_up for worker in self.workers)
        quiet_s = time.monotonic() - self._since
        if self._said_of_up is up or quiet_s < (STILL_AFTER_S if up else NONE_UP_AFTER_S):
            return
        held = [unit.example_id for worker in self.workers for unit in worker.units.values()]
        if up and not held:
            return
        self._said_of_up = up
        if not up:
            logger.warning("No tracing actor is up yet; the cluster may have no room to spare.")
            return
        logger.warning(
            "Nothing has finished for %.0f s. In flight: example %s and %d more. The teacher may "
            "be slow or down; what else a program waits for has no time limit.",
            quiet_s,
            held[0],
            len(held) - 1,
        )

    def _land(self, worker: Worker) -> Landed:
        try:
            durable = ray.get(worker.answer)
        except RayTaskError as error:
            raise _as_ours(error) from error
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                # The next one would not start either.
                raise _not_started(str(error).strip().splitlines()[-1].strip()) from error
            self._remove(worker)
            return Landed(worker, lost=error)
        worker.answer, worker.is_up = None, True
        worker.has_finished = worker.has_finished or bool(durable)
        return Landed(worker, durable or ())

    def _remove(self, worker: Worker) -> None:
        self.workers.remove(worker)
        ray.kill(worker.actor)


def _not_started(cause: str) -> TracingError:
    return TracingError(
        f"A tracing actor cannot start: {cause}. Every node needs raydistill, DSPy and what the "
        "program imports, in the versions that are here: install them there, or name them in "
        "Ray's runtime_env."
    )


def _as_ours(error: RayTaskError) -> DistillError:
    cause = error.cause if error.cause is not None else error
    if isinstance(cause, DistillError):
        return cause
    if isinstance(cause, ImportError):
        return _not_started(f"{type(cause).__name__}: {cause}")
    return TracingError(
        f"A tracing actor failed: {type(cause).__name__}: {secrets.scrubbed(str(cause))}. What "
        "was traced is kept; mend the cause and run the same command again."
    )
