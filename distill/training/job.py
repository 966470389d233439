"""A training run: rows in, a trained student out, through Ray Train.

Owns what happens on the driver: base model and tokens are made once, workers are started,
their progress is passed on, and the best checkpoint is named. Ray is already connected. What
a worker does is in ``loop``.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import TrainingFailedError

from distill.config import SCRATCH, StudentConfig, TrainConfig
from distill.rundir import RunDir
from distill.training.base_model import (
    load_tokenizer,
    local_base,
    make_scratch,
    max_positions,
)
from distill.training.batches import EncodedRows, count_steps
from distill.training.checkpoints import MODEL_FOLDER, SCORE
from distill.training.encoding import Conversation, encode
from distill.training.loop import train_loop_per_worker
from distill.training.mailbox import Event, run_with_events
from distill.training.resources import cpus_per_worker
from serve.errors import DistillError, TrainingError

logger = logging.getLogger(__name__)

_BASE = "base"
_SEAL = "config.json"


@dataclass(frozen=True)
class TrainingResult:
    """What training led to.

    Attributes:
        model_dir: Folder or URI of the best checkpoint's plain Hugging Face directory.
        rows: Rows trained on in each epoch.
        val_rows: Rows that the validation loss is of.
        dropped_rows: Rows left out of either because they are too long.
        tokens: Tokens of an epoch.
        steps: Optimizer steps of the whole run.
        seconds: Time spent training and validating, over all epochs.
        train_loss: Of the best epoch: mean over steps, prompt tokens as weighted.
        val_loss: Of the best epoch, per completion token; None without validation rows.
        val_exact: Share of the validation completions that the best epoch's student gives
            exactly, decoding greedily; None without validation rows.
        best_epoch: The epoch of ``model_dir``, from 1.
        num_parameters: Of the student.
        max_new_tokens: Enough for any completion like those trained on.
        history: One dict per epoch: epoch, train_loss, val_loss, val_exact, seconds,
            tokens_per_s.
    """

    model_dir: str
    rows: int
    val_rows: int
    dropped_rows: int
    tokens: int
    steps: int
    seconds: float
    train_loss: float
    val_loss: float | None
    val_exact: float | None
    best_epoch: int
    num_parameters: int
    max_new_tokens: int
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class _Data:
    train: EncodedRows
    val: EncodedRows
    num_dropped: int
    base: str


def train(
    *,
    train_rows: str,
    val_rows: str,
    student: StudentConfig,
    train: TrainConfig,
    storage: str,
    name: str,
    on_event: Callable[[Event], None],
) -> TrainingResult:
    """Train a student on rows, or go on where an earlier call of the same name stopped.

    Args:
        train_rows: Rows file; its rows are learned, and give a scratch student its tokens.
        val_rows: Rows file, may be empty; the epoch that does best on it is chosen.
        student: What is trained.
        train: How it is trained.
        storage: Ray Train's ``storage_path``, a folder or URI that all nodes reach.
        name: Ray Train's run name; other rows or settings need another one.
        on_event: Called in this thread with ``train_step`` and ``train_epoch`` events.

    Raises:
        ConfigurationError: The student model cannot be used.
        TrainingError: There is nothing to train on, or training failed.
    """
    data = _prepare(train_rows, val_rows, student, train, RunDir(f"{storage}/{name}"))
    result = _fit(data, student, train, storage, name, on_event)
    history = result.metrics["history"]
    checkpoint, best = max(result.best_checkpoints, key=lambda kept: kept[1][SCORE])
    return TrainingResult(
        model_dir=f"{storage}/{name}/{Path(checkpoint.path).name}/{MODEL_FOLDER}",
        rows=len(data.train),
        val_rows=len(data.val),
        dropped_rows=data.num_dropped,
        tokens=len(data.train.input_ids),
        steps=train.num_train_epochs * _steps_per_epoch(data, train),
        seconds=sum(epoch["seconds"] for epoch in history),
        train_loss=best["train_loss"],
        val_loss=best["val_loss"],
        val_exact=best["val_exact"],
        best_epoch=best["epoch"],
        num_parameters=result.metrics["num_parameters"],
        max_new_tokens=_max_new_tokens(data),
        history=history,
    )


def read_rows(path: str) -> list[Conversation]:
    """The conversations of a rows file.

    Raises:
        TrainingError: The file is not there, or is not a rows file.
    """
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["messages"] for line in lines if line.strip()]
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such rows file.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{path}: is not a rows file ({error!r}); expected JSON lines with messages."
        ) from error


def _prepare(
    train_rows: str, val_rows: str, student: StudentConfig, train: TrainConfig, run: RunDir
) -> _Data:
    run.create()
    conversations, held_out = read_rows(train_rows), read_rows(val_rows)
    base = student.model
    if base == SCRATCH:
        if not run.exists(f"{_BASE}/{_SEAL}"):
            with run.replacing(_BASE, seal=_SEAL) as folder:
                make_scratch(
                    folder,
                    conversations,
                    student.scratch,
                    max_length=train.max_length,
                    seed=train.seed,
                )
        base = run.join(_BASE)
    with local_base(base) as source:
        tokenizer = load_tokenizer(source)
        longest = min(train.max_length, max_positions(source) or train.max_length)
    rows, dropped = encode(conversations, tokenizer, longest)
    val, val_dropped = encode(held_out, tokenizer, longest)
    if not len(rows):
        raise TrainingError(
            f"{train_rows}: {len(conversations)} rows, none of at most {longest} tokens. "
            "Raise train.max_length, use student.prompt=folded, or keep more traces."
        )
    if dropped or val_dropped:
        logger.warning("%d rows are longer than %d tokens.", dropped + val_dropped, longest)
    return _Data(train=rows, val=val, num_dropped=dropped + val_dropped, base=base)


def _fit(
    data: _Data,
    student: StudentConfig,
    train: TrainConfig,
    storage: str,
    name: str,
    on_event: Callable[[Event], None],
) -> ray.train.Result:
    use_gpu = _use_gpu(train)
    cpus = 1 if use_gpu else _cpus_per_worker(train)
    loop_config = {
        "train": train.model_dump(),
        "base": data.base,
        "prompt_weight": _prompt_weight(student, train),
        "dropout": student.scratch.dropout if student.model == SCRATCH else 0.0,
        "use_gpu": use_gpu,
        "num_threads": cpus,
        "rows": ray.put(data.train),
        "val_rows": ray.put(data.val),
    }
    scaling_config = ray.train.ScalingConfig(
        num_workers=train.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus}
    )
    run_config = ray.train.RunConfig(
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

    def fit(mailbox: Any) -> ray.train.Result:
        trainer = ray.train.torch.TorchTrainer(
            train_loop_per_worker,
            train_loop_config={**loop_config, "mailbox": mailbox},
            scaling_config=scaling_config,
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=run_config,
        )
        return trainer.fit()

    try:
        result = run_with_events(fit, on_event)
    except TrainingFailedError as error:
        raise TrainingError(_explain(error)) from error
    if result.return_value is not None:
        raise TrainingError(result.return_value)
    return result


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


def _steps_per_epoch(data: _Data, train: TrainConfig) -> int:
    return count_steps(
        len(data.train),
        train.num_workers,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )


def _max_new_tokens(data: _Data) -> int:
    longest = max(
        int(np.add.reduceat(rows.completion, rows.offsets[:-1], dtype=np.int64).max())
        for rows in (data.train, data.val)
        if len(rows)
    )
    return longest + max(16, longest // 2)


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
