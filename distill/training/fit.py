"""Runs the training workers through Ray Train, as the driver sees it.

Owns what the workers are given, where they run, and that others are started in the place of
those that are lost; whether that is of use is for ``failures``. What they are to learn from is
made in ``data``, what one of them does is in ``loop``.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
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
from distill.training.failures import MOST_FAILURES, explain, is_final, is_for_want_of_room
from distill.training.loop import train_loop_per_worker
from distill.training.mailbox import run_with_events
from distill.training.resources import cpus_per_worker
from distill.training.room import my_turn, num_jobs, wait_for_room
from serve.errors import TrainingError

logger = logging.getLogger(__name__)


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
    use_gpu = _use_gpu(train)
    check_precision(train, use_gpu)
    attempt = partial(
        _attempt,
        data,
        student,
        train,
        use_gpu,
        storage=storage,
        name=name,
        on_event=on_event,
        cancelled=cancelled,
        on_wait=on_wait,
    )
    failures, had_room = 0, False
    while True:
        try:
            result = attempt(had_room=had_room)
            break
        except TrainingFailedError as error:
            failures += not is_for_want_of_room(error)
            had_room = True
            said = explain(error, student, train)
            if failures > MOST_FAILURES or is_final(error):
                raise TrainingError(said) from error
            logger.warning("Training goes on from its last checkpoint after a failure: %s", said)
    if result.return_value is not None:
        raise result.return_value
    return result


def _attempt(
    data: Data,
    student: StudentConfig,
    train: TrainConfig,
    use_gpu: bool,
    *,
    storage: str,
    name: str,
    on_event: Callable[[Event], None],
    cancelled: Callable[[], bool],
    on_wait: Callable[[str], None],
    had_room: bool,
) -> ray.train.Result:
    """Wait for room, and run the workers once, from the last checkpoint on."""
    with ExitStack() as turn:
        turn.enter_context(my_turn(cancelled))
        worker = _worker_resources(train, use_gpu)
        wait_for_room([worker] * train.num_workers, cancelled, on_wait, had_room)
        start = _starter(data, student, train, worker, storage, name)
        return run_with_events(start, on_event, cancelled, on_start=turn.close)


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
        # Ray Train would ask for room again, and that could be neither explained nor cancelled.
        failure_config=ray.train.FailureConfig(
            max_failures=0, controller_failure_limit=0, max_preemption_failures=0
        ),
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


def _worker_resources(train: TrainConfig, use_gpu: bool) -> dict[str, float]:
    """What a worker takes; the CPUs are divided among all jobs that want to train now."""
    if use_gpu:
        return {"CPU": 1, "GPU": 1}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return {"CPU": cpus_per_worker(nodes, train.num_workers * num_jobs())}
