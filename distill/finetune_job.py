"""A fine-tuning as DSPy sees it: a job with a status, a result and an end that can be asked for.

Owns that jobs take turns. What a job does is the provider's.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainingStatus

from serve.errors import TrainingCancelled

# A job takes all of the workers that it asks for, so two at once would wait for each other.
_one_at_a_time = threading.Lock()


class RayTrainingJob(TrainingJob):
    """A fine-tuning that runs, or waits for its turn, on the cluster."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._status = TrainingStatus.pending
        self._cancelling = threading.Event()

    def status(self) -> TrainingStatus:
        """Where the job stands."""
        return self._status

    def cancel(self) -> bool:
        """Stop the job at its next step; what it took of the cluster is free soon after.

        Returns:
            False if it had ended before.
        """
        # DSPy's own method says nothing of whether there was anything left to cancel.
        if not super(TrainingJob, self).cancel():
            return False
        self._cancelling.set()
        self._status = TrainingStatus.cancelled
        return True

    def is_cancelling(self) -> bool:
        """Whether ``cancel`` was called in time."""
        return self._cancelling.is_set()

    def started(self) -> None:
        """Note that its turn has come."""
        if not self.is_cancelling():
            self._status = TrainingStatus.running

    def set_result(self, result: Any) -> None:
        """End the job; an exception is raised by ``result()``, as by any future."""
        if self.cancelled():
            return
        if isinstance(result, Exception):
            self._status = TrainingStatus.failed
            self.set_exception(result)
        else:
            self._status = TrainingStatus.succeeded
            super().set_result(result)


@contextlib.contextmanager
def turn(job: RayTrainingJob) -> Iterator[None]:
    """Wait for the jobs before this one; it may be cancelled meanwhile."""
    while not _one_at_a_time.acquire(timeout=0.2):
        if job.is_cancelling():
            raise TrainingCancelled("The job was cancelled before its turn came.")
    try:
        job.started()
        yield
    finally:
        _one_at_a_time.release()
