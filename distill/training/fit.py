"""Runs the training workers through Ray Train, as the driver sees it.

Owns what the workers are given, where they run, and what is said when they fail. What they
are to learn from is made in ``job``, what one of them does is in ``loop``.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import TrainingFailedError

from distill.config import SCRATCH, StudentConfig, TrainConfig
from distill.training.batches import EncodedRows
from distill.training.checkpoints import SCORE
from distill.training.encoding import LongCounts
from distill.training.loop import train_loop_per_worker
from distill.training.mailbox import Event, run_with_events
from distill.training.resources import cpus_per_worker
from distill.training.room import my_turn, wait_for_room
from serve.errors import DistillError, TrainingError


@dataclass(frozen=True)
class Data:
    """What the workers learn from.

    Attributes:
        train: Rows that are learned.
        val: Rows that the epochs are compared by; may be none.
        long: What became of rows of either that are too long.
        base: Hugging Face directory or id that training starts from.
    """

    train: EncodedRows
    val: EncodedRows
    long: LongCounts
    base: str


def fit(
    data: Data,
    student: StudentConfig,
    train: TrainConfig,
    *,
    storage: str,
    name: str,
    on_event: Callable[[Event], None],
    cancelled: Callable[[], bool],
) -> ray.train.Result:
    """Train, or go on where an earlier call of the same name stopped.

    Raises:
        TrainingError: Training failed.
        TrainingCancelled: ``cancelled`` said so.
    """
    use_gpu = _use_gpu(train)
    worker = {"CPU": 1 if use_gpu else _cpus_per_worker(train)} | ({"GPU": 1} if use_gpu else {})
    loop_config = {
        "train": train.model_dump(),
        "base": data.base,
        "prompt_weight": _prompt_weight(student, train),
        "dropout": student.scratch.dropout if student.model == SCRATCH else 0.0,
        "use_gpu": use_gpu,
        "num_threads": worker["CPU"],
    }
    scaling_config = ray.train.ScalingConfig(
        num_workers=train.num_workers, use_gpu=use_gpu, resources_per_worker=worker
    )
    run_config = _run_config(storage, name, use_gpu)

    def start(mailbox: Any) -> ray.train.Result:
        # Only now, since they may be large and the wait for room long.
        rows = {"rows": ray.put(data.train), "val_rows": ray.put(data.val)}
        trainer = ray.train.torch.TorchTrainer(
            train_loop_per_worker,
            train_loop_config={**loop_config, **rows, "mailbox": mailbox},
            scaling_config=scaling_config,
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=run_config,
        )
        return trainer.fit()

    try:
        with ExitStack() as turn:
            turn.enter_context(my_turn(cancelled))
            wait_for_room([worker] * train.num_workers, cancelled)
            result = run_with_events(start, on_event, cancelled, on_start=turn.close)
    except TrainingFailedError as error:
        raise TrainingError(_explain(error)) from error
    if result.return_value is not None:
        raise result.return_value
    return result


def _run_config(storage: str, name: str, use_gpu: bool) -> ray.train.RunConfig:
    return ray.train.RunConfig(
        storage_path=storage,
        name=name,
        failure_config=ray.train.FailureConfig(max_failures=2),
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=1,
            checkpoint_score_attribute=SCORE,
            checkpoint_score_order="max",
        ),
        worker_runtime_env={"env_vars": _worker_environment(use_gpu)},
    )


def _prompt_weight(student: StudentConfig, train: TrainConfig) -> float:
    if train.prompt_loss_weight is not None:
        return train.prompt_loss_weight
    return 0.3 if student.model == SCRATCH else 0.0


def _worker_environment(use_gpu: bool) -> dict[str, str]:
    if use_gpu:
        return {"DS_ACCELERATOR": "cuda"}
    # Batches differ in length, so that glibc would give memory back and take it again in
    # every step; keeping it makes a small model's steps about a tenth faster.
    keep = str(1 << 40)
    return {
        "DS_ACCELERATOR": "cpu",
        "MALLOC_TRIM_THRESHOLD_": keep,
        "MALLOC_MMAP_THRESHOLD_": keep,
    }


def _use_gpu(train: TrainConfig) -> bool:
    if train.use_gpu != "auto":
        return train.use_gpu
    return ray.cluster_resources().get("GPU", 0) >= train.num_workers


def _cpus_per_worker(train: TrainConfig) -> int:
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return cpus_per_worker(nodes, train.num_workers)


def _explain(error: TrainingFailedError) -> str:
    """The message of the failure at the root."""
    failures = dict(getattr(error, "worker_failures", {}))
    causes = [failures[rank] for rank in sorted(failures)]
    causes += [error.controller_failure] if hasattr(error, "controller_failure") else []
    # A rank that loses its partner fails as well; an error of ours is where it began.
    ours = [cause for cause in causes if isinstance(cause, DistillError)]
    cause: BaseException = next(iter(ours or causes), error)
    while isinstance(inner := getattr(cause, "cause", None), BaseException):
        cause = inner
    message = str(cause).strip() or repr(cause)
    return message if isinstance(cause, DistillError) else f"{type(cause).__name__}: {message}"
