"""What an epoch leaves behind, and how training goes on from it.

A checkpoint holds ``engine/``, DeepSpeed's own state of every rank, and ``model/``, a plain
Hugging Face directory that needs nothing of ours to load. Ray Train stores it.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

ENGINE_TAG = "engine"
MODEL_FOLDER = "model"
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
