"""A DeepSpeed engine around the base model, and the loss it minimises.

Runs in a Ray Train worker. DeepSpeed is imported inside: it looks at its environment, which
Ray prepares, and may not be there on the driver.
"""

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from distill.config import LoraConfig, TrainConfig
from distill.training.base_model import load_model
from distill.training.batches import Batch
from distill.training.deepspeed_config import make_deepspeed_config, needs_compiler
from distill.training.lora import add_adapters
from distill.training.schedule import learning_rate_factor
from serve.errors import ConfigurationError, TrainingError


def start_engine(
    train: TrainConfig,
    base: str,
    tokenizer: Any,
    *,
    num_steps: int,
    use_gpu: bool,
    dropout: float,
    lora: LoraConfig | None = None,
) -> Any:
    """Load the base model and hand it to DeepSpeed.

    Args:
        train: The run's training section.
        base: Hugging Face directory or id.
        tokenizer: The base model's.
        num_steps: Optimizer steps of the whole run, for the learning rate.
        use_gpu: Whether each worker has a GPU.
        dropout: See ``add_dropout``.
        lora: Adapters to train in the place of the weights.

    Returns:
        A ``DeepSpeedEngine``.

    Raises:
        ConfigurationError: The configuration does not work here.
        TrainingError: The base model cannot be loaded.
    """
    import deepspeed

    # Its shared-memory operations would be compiled here and now; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.manual_seed(train.seed)
    config = make_deepspeed_config(
        train,
        num_workers=dist.get_world_size(),
        use_gpu=use_gpu,
        bf16_supported=_all_support_bf16(use_gpu),
    )
    if needs_compiler(config):
        _check_compiler()
    dtype = _data_type(config)
    flash = train.packing and use_gpu and dtype != torch.float32
    model: Any = load_model(base, tokenizer, dtype, flash=flash)
    add_dropout(model, dropout)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is not None:
        model = add_adapters(model, lora)
    factor = partial(
        learning_rate_factor,
        num_steps=num_steps,
        warmup_ratio=train.warmup_ratio,
        kind=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, train.weight_decay),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        config=config,
    )
    return engine


def weighted_losses(engine: Any, batch: Batch) -> torch.Tensor:
    """float32[N], weight times cross entropy of each of ``batch.predicting``, in its order."""
    logits, targets, weights = _predict(engine, batch)
    return F.cross_entropy(logits.float(), targets, reduction="none") * weights


def validate_batch(engine: Any, batch: Batch) -> torch.Tensor:
    """float32[2]: the loss sum, and how many rows greedy decoding would complete exactly.

    A completion comes out as it stands if each of its tokens is the likeliest after the
    right ones before it, so one forward pass tells.
    """
    logits, targets, weights = _predict(engine, batch)
    losses = F.cross_entropy(logits.float(), targets, reduction="none") * weights
    rows = torch.from_numpy(batch.predicting.nonzero()[0]).to(engine.device)
    counts = weights > 0
    wrong = counts & (logits.argmax(-1) != targets)
    counted, missed = (
        torch.zeros(len(batch.weights), device=engine.device).index_add(0, rows, each.float())
        for each in (counts, wrong)
    )
    exact = (counted > 0) & (missed == 0)
    return torch.stack([losses.sum(), exact.sum().float()])


@torch.no_grad()
def check_packing(engine: Any) -> None:
    """See that the model keeps rows of one sequence apart. Every rank calls it.

    Not every architecture knows them by their positions, and with some kinds of attention
    only a batch of one sequence does.

    Raises:
        TrainingError: It does not.
    """
    ids, positions = np.arange(5, 21), np.tile(np.arange(8), (2, 2))
    ids = np.stack([ids, np.roll(ids, 8)])
    batch = _fitted_to(engine, Batch(ids, None, np.ones(ids.shape, np.float32), positions))
    engine.eval()
    try:
        logits = _logits(engine, batch, keep=0).view(*ids.shape, -1)
    except TypeError as error:
        raise TrainingError(_not_apart(str(error))) from error
    # The same rows in the other order: what has seen another row differs by more than rounding.
    found, other = logits.float(), logits.float().roll(8, dims=1).flip(0)
    if (found - other).abs().max() > torch.finfo(logits.dtype).eps ** 0.5 * found.abs().max():
        raise TrainingError(_not_apart("a row's answers change with the rows before it"))


def _not_apart(found: str) -> str:
    return (
        "train.packing needs a model that keeps the rows of a sequence apart, and this one does "
        f"not ({found}). Set train.packing=false."
    )


def _predict(engine: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V], targets int64[N] and weights float32[N] of ``batch.predicting``.

    Only these positions are projected on the vocabulary: where prompts are long and count
    nothing, the others would be most of the work, and of the memory.
    """
    predicting = batch.predicting
    targets, weights = (
        torch.from_numpy(array[:, 1:][predicting[:, :-1]]).to(engine.device)
        for array in (batch.input_ids, batch.weights)
    )
    fitted = _fitted_to(engine, batch)
    keep = predicting.reshape(fitted.weights.shape)
    return _logits(engine, fitted, torch.from_numpy(keep).to(engine.device)), targets, weights


def _logits(engine: Any, batch: Batch, keep: torch.Tensor | int) -> torch.Tensor:
    """[N, V] of the positions kept, bool[B, T]; 0 is all of them, [B, T, V]."""
    # Without a mask, models keep apart the rows whose positions begin anew.
    arrays = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    given = {
        name: torch.from_numpy(array).to(engine.device)
        for name, array in arrays.items()
        if array is not None
    }
    return engine(**given, logits_to_keep=keep, use_cache=False).logits


def _fitted_to(engine: Any, batch: Batch) -> Batch:
    """The batch in the shape in which the model's attention keeps packed rows apart.

    Flash attention looks for rows in a batch of one sequence only. Others would pay for that:
    they make a mask of the square of its length.
    """
    attention = getattr(engine, "module", engine).config._attn_implementation
    is_flash = str(attention).startswith("flash_attention")
    return batch.as_one_sequence() if is_flash and batch.position_ids is not None else batch


def add_dropout(model: torch.nn.Module, rate: float) -> None:
    """Leave out a share of the embeddings' and each sublayer's output while training.

    Llama has no such dropout of its own, and learns a small set of rows by heart without
    it. As hooks it leaves weights and configuration alone.
    """
    if not rate:
        return

    def drop(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate, module.training), *output[1:])
        return F.dropout(output, rate, module.training)

    decoder = model.get_decoder()
    sublayers = [part for layer in decoder.layers for part in (layer.self_attn, layer.mlp)]
    for module in (decoder.embed_tokens, *sublayers):
        module.register_forward_hook(drop)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _data_type(config: Mapping[str, Any]) -> torch.dtype:
    """What the engine's weights are of; DeepSpeed keeps a float32 copy beside 16-bit ones."""
    if config["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if config["fp16"]["enabled"] else torch.float32


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    if missing:
        raise ConfigurationError(
            "train.deepspeed.optimizer: DeepSpeed builds its own Adam when it is first used, and "
            f"a training node has no {' and no '.join(missing)}. Install them on every node, or "
            "leave torch_adam true, which needs neither."
        )


def _all_support_bf16(use_gpu: bool) -> bool:
    """Whether every rank computes in bfloat16: they have to agree on a data type."""
    device = "cuda" if use_gpu else "cpu"
    supported = torch.tensor(float(_supports_bf16(use_gpu)), device=device)
    dist.all_reduce(supported, op=dist.ReduceOp.MIN)
    return bool(supported.item())


def _supports_bf16(use_gpu: bool) -> bool:
    if use_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text("utf-8").split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
