"""What an epoch leaves behind, and how training goes on from it.

A checkpoint holds ``engine/``, DeepSpeed's own state of every rank, and ``model/``, a plain
Hugging Face directory that needs nothing of ours to load. Ray Train stores it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import torch
import torch.distributed as dist

ENGINE_TAG = "engine"
MODEL_FOLDER = "model"
T = TypeVar("T")
SCORE = "quality"
"""The metric by which Ray Train chooses the checkpoint that it keeps."""


def quality(epoch: Mapping[str, Any]) -> float:
    """How good the student of an epoch is; more is better.

    First counts how many validation completions it would give exactly, then their loss:
    a student goes on getting more answers right long after the loss of the ones that it
    gets wrong has begun to rise. Without validation rows the training loss decides.
    """
    if epoch["val_loss"] is None:
        return -epoch["train_loss"]
    return epoch["val_exact"] - 1e-6 * epoch["val_loss"]


def choose(
    kept: Sequence[tuple[T, Mapping[str, Any]]], num_val_rows: int
) -> tuple[T, Mapping[str, Any]]:
    """The checkpoint to export: the best, or the last where that is as good within error.

    A few hundred validation rows tell neighbouring epochs apart only by chance, and the last
    one has learned at the lowest rates (the one-standard-error rule of Breiman et al.,
    Classification and Regression Trees, 1984, with the last epoch in the simplest tree's
    place).

    Args:
        kept: Checkpoints with their metrics, the best and the last among them.
        num_val_rows: How many rows ``val_exact`` is a share of.
    """
    best = max(kept, key=lambda one: one[1][SCORE])
    last = max(kept, key=lambda one: one[1]["epoch"])
    if not num_val_rows:
        return best
    share = best[1]["val_exact"]
    error = (share * (1 - share) / num_val_rows) ** 0.5
    return last if last[1]["val_exact"] >= share - error else best


def report_epoch(engine: Any, tokenizer: Any, metrics: dict[str, Any]) -> None:
    """Save a checkpoint and report it with its metrics to Ray Train. Every rank calls it.

    Args:
        engine: The DeepSpeed engine.
        tokenizer: Saved beside the weights.
        metrics: Plain JSON values; they come back from ``resume``.
    """
    with tempfile.TemporaryDirectory(prefix="raydistill-checkpoint-") as folder:
        engine.save_checkpoint(folder, tag=ENGINE_TAG, client_state={"metrics": metrics})
        export_model(engine, tokenizer, Path(folder) / MODEL_FOLDER)
        dist.barrier()
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def resume(engine: Any) -> dict[str, Any] | None:
    """Load the latest checkpoint into the engine, if there is one. Every rank calls it.

    Returns:
        The metrics it was saved with; None where training starts anew.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        _, client_state = engine.load_checkpoint(folder, tag=ENGINE_TAG)
        # Ranks of a node share a downloaded copy; none may leave while others read.
        dist.barrier()
    return client_state["metrics"]


def export_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as a plain Hugging Face directory. Every rank calls it; rank 0 writes."""
    weights = _gather_weights(engine.module)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def _gather_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights on rank 0's CPU, whatever the ZeRO stage; one at a time, to spare memory."""
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if dist.get_rank() == 0:
                # Tied weights stay one tensor, so that they are written once.
                copy = copies.setdefault(id(tensor), tensor.detach().cpu().clone())
                weights[name] = copy
    return weights
