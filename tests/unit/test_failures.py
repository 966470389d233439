"""Which failures of training's workers are followed by another attempt."""

import pickle

import pytest
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from distill.config import StudentConfig, TrainConfig
from distill.training.failures import explain, is_final, is_for_want_of_room


def of_workers(*causes):
    return WorkerGroupError("failed", dict(enumerate(causes)))


LOST = of_workers(
    WorkerHealthCheckFailedError(
        "A worker health check failed.", RayActorError(error_msg="perhaps by the OOM killer")
    ),
    RuntimeError("connection closed by peer"),
)
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))
NOT_STARTED = ControllerError(WorkerGroupStartupFailedError("a node went"))
NO_STORAGE = ControllerError(OSError("no space left"))
NO_MEMORY = of_workers(
    RuntimeError("connection closed by peer"), torch.OutOfMemoryError("CUDA out of memory.")
)


@pytest.mark.parametrize(
    ("error", "final", "want_of_room"),
    [
        (LOST, False, False),
        (NO_ROOM, False, True),
        (NOT_STARTED, False, False),
        (NO_STORAGE, True, False),
        (NO_MEMORY, True, False),
    ],
)
def test_training_is_tried_again_where_that_may_end_better(error, final, want_of_room):
    error = pickle.loads(pickle.dumps(error))
    assert is_final(error) == final
    assert is_for_want_of_room(error) == want_of_room


def test_the_failure_at_the_root_is_told():
    assert "train.gradient_checkpointing" in explain(NO_MEMORY, StudentConfig(), TrainConfig())
    assert explain(NO_STORAGE, StudentConfig(), TrainConfig()) == "OSError: no space left"
