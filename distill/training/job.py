"""A training job: rows in, a trained student out.

Owns the result: which checkpoint is the student, and what there is to say of its training. Ray
is already connected. What is learned from is made in ``data``, the workers are run by ``fit``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import SelectBy, StudentConfig, TrainConfig
from distill.rundir import RunDir
from distill.training.batches import count_steps
from distill.training.checkpoints import MODEL_FOLDER, SCORE, WORST
from distill.training.choice import overfitting
from distill.training.data import Data, name_rows, prepare
from distill.training.events import Event
from distill.training.fit import fit
from distill.training.room import among_jobs
from serve.errors import TrainingDiverged, TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may become the student.

    Attributes:
        model_dir: Folder or URI of its plain Hugging Face directory.
        step, epoch: When it was saved, both from 1.
        train_loss: Since the evaluation before: mean over steps, prompt tokens as weighted.
        val_loss: Per completion token; None without validation rows.
        val_exact: Share of the validation completions that it gives exactly, decoding
            greedily; None without validation rows.
        metric: What the program scores with it on the dev set; None where it was not asked.
        cost_usd: What the metric has cost, where it asks an LM.
    """

    model_dir: str
    step: int
    epoch: int
    train_loss: float
    val_loss: float | None
    val_exact: float | None
    metric: float | None = None
    cost_usd: float = 0.0


@dataclass(frozen=True)
class TrainingResult:
    """What training led to.

    Attributes:
        model_dir: Folder or URI of the chosen checkpoint's plain Hugging Face directory; the
            last one's where ``save_strategy`` is ``no``.
        rows: Rows trained on in each epoch; of a conversation whose turns cannot share one,
            each turn is a row.
        val_rows: Rows that the validation loss is of.
        dropped_rows: Rows left out of either because they are too long.
        cut_rows: Rows of either that were cut because they are too long.
        tokens: Tokens of an epoch.
        steps: Optimizer steps that were done.
        stopped_early: Whether patience ended it before the last epoch.
        seconds: Time spent training and validating, over all epochs.
        train_loss, val_loss, val_exact: Of the chosen one; see ``Candidate``.
        best_epoch, best_step: When ``model_dir`` was saved, both from 1.
        num_parameters: Of the student.
        max_new_tokens: Enough for any completion like those trained on.
        history: One dict per epoch; see ``position``.
        evaluations: One dict per evaluation; see ``choice``.
        candidates: The checkpoints that were kept, the best first.
        selected_by: What it was chosen by.
        overfitting: What says that it learned its rows by heart; None where nothing does.
    """

    model_dir: str
    rows: int
    val_rows: int
    dropped_rows: int
    cut_rows: int
    tokens: int
    steps: int
    stopped_early: bool
    seconds: float
    train_loss: float
    val_loss: float | None
    val_exact: float | None
    best_epoch: int
    best_step: int
    num_parameters: int
    max_new_tokens: int
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    candidates: list[Candidate]
    selected_by: SelectBy
    overfitting: str | None

    def choosing(self, candidates: Sequence[Candidate]) -> "TrainingResult":
        """The same, with the first of these candidates as the student."""
        best = candidates[0]
        return replace(
            self,
            model_dir=best.model_dir,
            train_loss=best.train_loss,
            val_loss=best.val_loss,
            val_exact=best.val_exact,
            best_epoch=best.epoch,
            best_step=best.step,
            candidates=list(candidates),
        )


def train(
    *,
    train_rows: str,
    val_rows: str,
    student: StudentConfig,
    train: TrainConfig,
    storage: str,
    name: str,
    on_event: Callable[[Event], None],
    cancelled: Callable[[], bool] = lambda: False,
    on_wait: Callable[[str], None] = logger.warning,
) -> TrainingResult:
    """Train a student on rows, or go on where an earlier call of the same name stopped.

    Any thread may call it, and several at once: each waits until the cluster has room for it.

    Args:
        train_rows: Rows file; its rows are learned, and give a scratch student its tokens.
        val_rows: Rows file, may be empty; the epoch that does best on it is chosen.
        student: What is trained.
        train: How it is trained.
        storage: Ray Train's ``storage_path``, a folder or URI that all nodes reach.
        name: Ray Train's run name; other rows or settings need another one.
        on_event: Called in this thread with each event; see ``events``.
        cancelled: Asked in this thread, about twice a second, whether to stop. The workers
            then stop at their next logging step; what was saved before is kept, so that the
            same call goes on from there. A job that ends first is not cancelled any more.
        on_wait: Told why the workers cannot start yet, where they have to wait; again where
            others have to start in their place.

    Raises:
        ConfigurationError: The student model cannot be used, or the cluster is too small.
        TrainingError: There is nothing to train on, or training failed.
        TrainingCancelled: ``cancelled`` said so; the workers are gone.
    """
    with among_jobs():
        data = prepare(train_rows, val_rows, student, train, RunDir(f"{storage}/{name}"))
        try:
            result = fit(
                data,
                student,
                train,
                storage=storage,
                name=name,
                on_event=on_event,
                cancelled=cancelled,
                on_wait=on_wait,
            )
        except TrainingDiverged as error:
            rows = [int(n) for row in error.rows for n in data.train.conversations(row)]
            raise TrainingError(f"{error} {name_rows(train_rows, rows)}.") from error
    return _read_result(result, data, train, f"{storage}/{name}")


def _read_result(result: Any, data: Data, train: TrainConfig, folder: str) -> TrainingResult:
    metrics, per_epoch = result.metrics, _steps_per_epoch(data, train)
    # An earlier version, whose run this may go on from, noted less.
    history = [{"steps": per_epoch, **epoch} for epoch in metrics["history"]]
    ends = [{**epoch, "step": per_epoch * epoch["epoch"]} for epoch in history]
    evaluations = metrics.get("evaluations", ends)
    steps = sum(epoch["steps"] for epoch in history)
    kept = sorted(result.best_checkpoints, key=lambda pair: pair[1][SCORE], reverse=True)
    candidates = [
        Candidate(
            model_dir=f"{folder}/{Path(checkpoint.path).name}/{MODEL_FOLDER}",
            step=found.get("step", per_epoch * found["epoch"]),
            **{name: found[name] for name in ("epoch", "train_loss", "val_loss", "val_exact")},
        )
        for checkpoint, found in kept
        if found[SCORE] > WORST
    ]
    best = candidates[0]
    return TrainingResult(
        model_dir=best.model_dir,
        rows=data.train.num_rows,
        val_rows=len(data.val),
        dropped_rows=data.long.dropped,
        cut_rows=data.long.cut,
        tokens=len(data.train.input_ids),
        steps=steps,
        stopped_early=steps < per_epoch * train.num_train_epochs,
        seconds=sum(epoch["seconds"] for epoch in history),
        train_loss=best.train_loss,
        val_loss=best.val_loss,
        val_exact=best.val_exact,
        best_epoch=best.epoch,
        best_step=best.step,
        num_parameters=metrics["num_parameters"],
        max_new_tokens=_max_new_tokens(data),
        history=history,
        evaluations=evaluations,
        candidates=candidates,
        selected_by=train.select_by,
        overfitting=overfitting(evaluations, train.select_by, len(data.val)),
    )


def _steps_per_epoch(data: Data, train: TrainConfig) -> int:
    return count_steps(
        len(data.train),
        train.num_workers,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )


def _max_new_tokens(data: Data) -> int:
    longest = max(rows.longest_completion for rows in (data.train, data.val))
    return longest + max(16, longest // 2)
