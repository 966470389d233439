"""What training leaves behind on its way, and how it goes on from there.

A checkpoint holds ``engine/``, DeepSpeed's own state of every rank, and at an evaluation also
``model/``, a plain Hugging Face directory that needs nothing of ours to load. Ray Train
stores it. When one is saved is for ``timetable``, which is the better one for ``choice``.
"""

import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict
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
from distill.training.position import Position

ENGINE_TAG = "engine"
MODEL_FOLDER = "model"
SCORE = "quality"
"""The metric by which Ray Train chooses the checkpoint that it keeps."""

WORST = -sys.float_info.max
"""Of a checkpoint that holds no student to choose. Finite, since it goes through JSON."""


def save_step(engine: Any, position: Position) -> None:
    """Save the state between evaluations, to go on from there. Every rank calls it."""
    metrics = {SCORE: WORST, "history": position.history, "evaluations": position.evaluations}
    with tempfile.TemporaryDirectory(prefix="raydistill-checkpoint-") as folder:
        _report(engine, folder, position, metrics)


def save_student(engine: Any, position: Position, tokenizer: Any, score: float) -> None:
    """Save the state and the student after an evaluation. Every rank calls it.

    Args:
        engine: The DeepSpeed engine.
        position: Where training is; its last evaluation goes to Ray Train.
        tokenizer: Saved beside the weights.
        score: How good the student is.
    """
    metrics = {
        **position.evaluations[-1],
        SCORE: score,
        "history": position.history,
        "evaluations": position.evaluations,
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


def resume(engine: Any, steps_per_epoch: int) -> Position:
    """Load the latest checkpoint into the engine, if there is one. Every rank calls it.

    Returns:
        Where it was saved; the beginning where there is none.

    Raises:
        TrainingError: It cannot be gone on from.
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
    return Position.read(client_state["position"], steps_per_epoch)


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
