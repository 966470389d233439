"""Runs the training workers through Ray Train, as the driver sees it.

Owns what the workers are given, where they run, and what is said when they fail. What they
are to learn from is made in ``data``, what one of them does is in ``loop``.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import TrainingFailedError

from distill.config import SCRATCH, StudentConfig, TrainConfig
from distill.training.checkpoints import SCORE
from distill.training.choice import num_kept
from distill.training.data import Data
from distill.training.deepspeed_config import check_precision
from distill.training.events import Event
from distill.training.loop import train_loop_per_worker
from distill.training.mailbox import run_with_events
from distill.training.memory import is_out_of_memory, out_of_memory
from distill.training.resources import cpus_per_worker
from distill.training.room import my_turn, num_jobs, wait_for_room
from serve.errors import DistillError, TrainingError


def fit(
    data: Data,
    student: StudentConfig,
    train: TrainConfig,
    *,
    storage: str,
    name: str,
    on_event: Callable[[Event], None],
    cancelled: Callable[[], bool],
    on_wait: Callable[[str], None],
) -> ray.train.Result:
    """Train, or go on where an earlier call of the same name stopped.

    Raises:
        ConfigurationError: The cluster could never hold the workers, or they cannot do what is
            configured.
        TrainingError: Training failed.
        TrainingCancelled: ``cancelled`` said so.
    """
    check_precision(train, _use_gpu(train))
    try:
        with ExitStack() as turn:
            turn.enter_context(my_turn(cancelled))
            worker = _worker_resources(train)
            wait_for_room([worker] * train.num_workers, cancelled, on_wait)
            start = _starter(data, student, train, worker, storage, name)
            result = run_with_events(start, on_event, cancelled, on_start=turn.close)
    except TrainingFailedError as error:
        raise TrainingError(_explain(error, student, train)) from error
    failure = result.return_value
    if failure is not None and is_out_of_memory(failure):
        raise TrainingError(out_of_memory(failure, student, train)) from failure
    if failure is not None:
        raise failure
    return result


def _starter(
    data: Data,
    student: StudentConfig,
    train: TrainConfig,
    worker: dict[str, float],
    storage: str,
    name: str,
) -> Callable[[Any], ray.train.Result]:
    """What starts the workers, given a mailbox, and waits for their end."""
    use_gpu = "GPU" in worker
    loop_config = {
        "train": train.model_dump(),
        "base": data.base,
        "prompt_weight": _prompt_weight(student, train),
        "dropout": student.scratch.dropout if student.model == SCRATCH else 0.0,
        "lora": student.lora.model_dump() if student.lora else None,
        "use_gpu": use_gpu,
        "num_threads": worker["CPU"],
    }
    scaling_config = ray.train.ScalingConfig(
        num_workers=train.num_workers, use_gpu=use_gpu, resources_per_worker=worker
    )
    run_config = _run_config(storage, name, train, use_gpu)

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

    return start


def _run_config(storage: str, name: str, train: TrainConfig, use_gpu: bool) -> ray.train.RunConfig:
    return ray.train.RunConfig(
        storage_path=storage,
        name=name,
        failure_config=ray.train.FailureConfig(max_failures=2),
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=num_kept(train.save_total_limit, train.select_by),
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


def _worker_resources(train: TrainConfig) -> dict[str, float]:
    """What a worker takes; the CPUs are divided among all jobs that want to train now."""
    if _use_gpu(train):
        return {"CPU": 1, "GPU": 1}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return {"CPU": cpus_per_worker(nodes, train.num_workers * num_jobs())}


def _explain(error: TrainingFailedError, student: StudentConfig, train: TrainConfig) -> str:
    """The message of the failure at the root."""
    failures = dict(getattr(error, "worker_failures", {}))
    causes = [failures[rank] for rank in sorted(failures)]
    causes += [error.controller_failure] if hasattr(error, "controller_failure") else []
    # A rank that loses its partner fails as well; these are where it began.
    ours = [c for c in causes if isinstance(c, DistillError) or is_out_of_memory(c)]
    cause: BaseException = next(iter(ours or causes), error)
    while isinstance(inner := getattr(cause, "cause", None), BaseException):
        cause = inner
    message = str(cause).strip() or repr(cause)
    if is_out_of_memory(cause):
        return out_of_memory(cause, student, train)
    return message if isinstance(cause, DistillError) else f"{type(cause).__name__}: {message}"
