"""What training leaves behind on its way, and how it goes on from there.

A checkpoint holds ``engine/``, DeepSpeed's own state of every rank, and after an epoch also
``model/``, a plain Hugging Face directory that needs nothing of ours to load. Ray Train
stores it. When one is saved is for ``loop``.
"""

import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from distill.training.lora import (
    ADAPTER_FOLDER,
    is_adapted,
    merge,
    plain_model,
    save_adapter,
)

ENGINE_TAG = "engine"
MODEL_FOLDER = "model"
SCORE = "quality"
"""The metric by which Ray Train chooses the checkpoint that it keeps."""

# Finite, since it goes through JSON: within an epoch there is no student to choose.
_WORST = -sys.float_info.max


@dataclass(frozen=True)
class Position:
    """How far training has come.

    Attributes:
        history: A summary of each finished epoch.
        losses: Of the steps done in the epoch under way.
        seconds: Spent on these.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def quality(epoch: Mapping[str, Any]) -> float:
    """How good the student of an epoch is; more is better.

    First counts how many validation completions it would give exactly, then their loss:
    a student goes on getting more answers right long after the loss of the ones that it
    gets wrong has begun to rise. Without validation rows the training loss decides.
    """
    if epoch["val_loss"] is None:
        return -epoch["train_loss"]
    return epoch["val_exact"] - 1e-6 * epoch["val_loss"]


def save_step(engine: Any, position: Position) -> None:
    """Save the state within an epoch, to go on from there. Every rank calls it."""
    metrics = {SCORE: _WORST, "history": position.history}
    with tempfile.TemporaryDirectory(prefix="raydistill-checkpoint-") as folder:
        _report(engine, folder, position, metrics)


def save_epoch(engine: Any, position: Position, tokenizer: Any) -> None:
    """Save the state and the student after an epoch. Every rank calls it.

    Args:
        engine: The DeepSpeed engine.
        position: Where training is; its last epoch's summary goes to Ray Train.
        tokenizer: Saved beside the weights.
    """
    summary = position.history[-1]
    metrics = {
        **summary,
        SCORE: quality(summary),
        "history": position.history,
        "num_parameters": _num_parameters(engine.module),
    }
    with tempfile.TemporaryDirectory(prefix="raydistill-checkpoint-") as folder:
        export_model(engine, tokenizer, Path(folder) / MODEL_FOLDER)
        _report(engine, folder, position, metrics)


def _report(engine: Any, folder: str, position: Position, metrics: dict[str, Any]) -> None:
    engine.save_checkpoint(
        folder,
        tag=ENGINE_TAG,
        client_state={"position": asdict(position)},
        # They are the base model's, and loaded from there each time.
        exclude_frozen_parameters=is_adapted(engine.module),
    )
    dist.barrier()
    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def resume(engine: Any) -> Position:
    """Load the latest checkpoint into the engine, if there is one. Every rank calls it.

    Returns:
        Where it was saved; the beginning where there is none.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as folder:
        adapted = is_adapted(engine.module)
        _, client_state = engine.load_checkpoint(
            folder, tag=ENGINE_TAG, load_module_strict=not adapted
        )
        # Ranks of a node share a downloaded copy; none may leave while others read.
        dist.barrier()
    return Position(**client_state["position"])


def export_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as a plain Hugging Face directory. Every rank calls it; rank 0 writes.

    The weights are those that the engine computes with, bit for bit, in their own data type:
    of bf16 and fp16 the 16-bit ones, not DeepSpeed's float32 copies. Adapters are merged into
    them, and are besides in a folder of their own.
    """
    model = plain_model(engine.module)
    parts = weights = _gather_weights(model)
    if is_adapted(engine.module):
        weights = merge(engine.module, parts, _gathered)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        if is_adapted(engine.module):
            save_adapter(engine.module, parts, folder / ADAPTER_FOLDER)


def _num_parameters(model: torch.nn.Module) -> int:
    # Under ZeRO-3 a parameter holds only its part; ds_numel is the whole. Adapters are merged.
    weights = plain_model(model).named_parameters()
    return sum(getattr(p, "ds_numel", p.numel()) for name, p in weights if ".lora_" not in name)


def _gathered(parameters: list[torch.Tensor]) -> AbstractContextManager[Any]:
    import deepspeed

    partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    return deepspeed.zero.GatheredParameters(parameters, enabled=partitioned)


def _gather_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights on rank 0's CPU, whatever the ZeRO stage; one at a time, to spare memory."""
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with _gathered([tensor]):
            if dist.get_rank() == 0:
                # Tied weights stay one tensor, so that they are written once.
                copy = copies.setdefault(id(tensor), tensor.detach().cpu().clone())
                weights[name] = copy
    return weights
