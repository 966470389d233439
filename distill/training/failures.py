"""What follows when training's workers fail: another attempt, or the end, and in which words.

Pure: what Ray Train raised goes in. Making the attempts is for ``fit``.
"""

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError

from distill.config import StudentConfig, TrainConfig
from distill.training.memory import is_out_of_memory, out_of_memory
from serve.errors import DistillError

MOST_FAILURES = 2
"""After so many failures there is still another attempt."""


def is_for_want_of_room(error: TrainingFailedError) -> bool:
    """Whether the workers had nowhere to be, or the cluster took their node back.

    It says nothing about the training, however often it happens.
    """
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
    return isinstance(error, PreemptionError) or any(
        isinstance(cause, RayActorError) and cause.preempted for cause in _causes(error)
    )


def is_final(error: TrainingFailedError) -> bool:
    """Whether another attempt would end the same."""
    if isinstance(error, ControllerError):
        may_pass = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
        return not isinstance(error.controller_failure, may_pass)
    # A worker that was killed may have been so for the memory that others took.
    raised = [cause for cause in _causes(error) if not isinstance(cause, RayActorError)]
    return any(is_out_of_memory(cause) for cause in raised)


def explain(error: TrainingFailedError, student: StudentConfig, train: TrainConfig) -> str:
    """The message of the failure at the root."""
    causes = _causes(error)
    # A rank that loses its partner fails as well; these are where it began.
    ours = [c for c in causes if isinstance(c, DistillError) or is_out_of_memory(c)]
    cause = next(iter(ours or causes), error)
    if is_out_of_memory(cause):
        return out_of_memory(cause, student, train)
    message = str(cause).strip() or repr(cause)
    return message if isinstance(cause, DistillError) else f"{type(cause).__name__}: {message}"


def _causes(error: TrainingFailedError) -> list[BaseException]:
    """What each rank failed of, by rank; what the controller did, after them."""
    failures = dict(getattr(error, "worker_failures", {}))
    causes = [failures[rank] for rank in sorted(failures)]
    causes += [error.controller_failure] if hasattr(error, "controller_failure") else []
    return [_root(cause) for cause in causes]


def _root(cause: BaseException) -> BaseException:
    for name in ("cause", "health_check_failure"):
        if isinstance(inner := getattr(cause, name, None), BaseException):
            return _root(inner)
    return cause
