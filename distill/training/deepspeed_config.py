"""The DeepSpeed configuration, generated from ``train`` with ``train.deepspeed`` over it.

Pure: it neither imports DeepSpeed nor knows whether its optional features are there.
"""

from collections.abc import Mapping
from typing import Any

from distill.config import TrainConfig
from serve.errors import ConfigurationError


def make_deepspeed_config(
    train: TrainConfig, *, num_workers: int, use_gpu: bool, bf16_supported: bool
) -> dict[str, Any]:
    """The configuration that ``deepspeed.initialize`` is given.

    Args:
        train: The run's training section.
        num_workers: World size.
        use_gpu: Whether it trains on GPUs.
        bf16_supported: Whether the processors compute in bfloat16; ``train.bf16: auto``
            follows it.

    Raises:
        ConfigurationError: ``train.deepspeed`` contradicts a key that has a name of its own.
    """
    _check_overrides(train, num_workers)
    bf16 = train.bf16 if train.bf16 != "auto" else bf16_supported and not train.fp16
    # Pinned memory is what makes the way to a GPU fast; on CPU there is no such way.
    offload = {"device": "cpu", "pin_memory": use_gpu}
    bucket = 50_000_000 if use_gpu else 5_000_000
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": bf16 and train.zero_stage > 0},
        # Said, since without ZeRO the first scale would be 2 to the 32nd, and the first steps lost.
        "fp16": {"enabled": train.fp16, "initial_scale_power": 16},
        # Without ZeRO, DeepSpeed's bf16 keeps no fp32 weights to add small updates to.
        "torch_autocast": {"enabled": bf16 and train.zero_stage == 0, "dtype": "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                # transformers' defaults. A 4M Banking77 student's validation loss after two
                # epochs was 0.31 with them, 0.48 with the 0.95 of Llama's pre-training.
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
                # PyTorch's own AdamW, also where it is offloaded: DeepSpeed's kernels are built
                # when first used, which needs a compiler on every node.
                "torch_adam": True,
            },
        },
        "zero_optimization": {
            "stage": train.zero_stage,
            # On CPU there is no second stream to overlap with, and the default bucket of
            # 500 million elements would be allocated whole.
            "overlap_comm": use_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **{f"offload_{part}": offload for part in _offloaded(train)},
        },
        "steps_per_print": 1_000_000_000,
    }
    if (bf16 or train.fp16) and train.gradient_accumulation_steps > 1 and train.zero_stage > 0:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(generated, train.deepspeed)


def _check_overrides(train: TrainConfig, num_workers: int) -> None:
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    owned = {
        "train_batch_size": (
            micro * accumulation * num_workers,
            "train.per_device_train_batch_size",
        ),
        "train_micro_batch_size_per_gpu": (micro, "train.per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.gradient_accumulation_steps"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "zero_optimization.stage": (train.zero_stage, "train.zero_stage"),
        "optimizer.params.lr": (train.learning_rate, "train.learning_rate"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
        "scheduler": (None, "train.lr_scheduler_type and train.warmup_ratio"),
        "bf16.enabled": (train.bf16, "train.bf16"),
        "fp16.enabled": (train.fp16, "train.fp16"),
    }
    for key, (value, own) in owned.items():
        found = _lookup(train.deepspeed, key)
        if found is not None and found != value:
            expected = "" if value is None else f"; {own} makes it {value}"
            raise ConfigurationError(
                f"train.deepspeed.{key}={found!r} is not read from there{expected}. "
                f"Set {own} instead."
            )
    for part in ("optimizer", "param"):
        _check_offload(train, part)


def _check_offload(train: TrainConfig, part: str) -> None:
    """Further settings of an offload are read; whether there is one is not said there."""
    found = _lookup(train.deepspeed, f"zero_optimization.offload_{part}")
    if not isinstance(found, Mapping):
        return
    offloads = part in _offloaded(train)
    if offloads == (_lookup(found, "device") == "none"):
        raise ConfigurationError(
            f"train.deepspeed.zero_optimization.offload_{part}={found!r} is not read from there; "
            f"train.offload_{part} is {offloads}. Set train.offload_{part} instead."
        )


def _offloaded(train: TrainConfig) -> list[str]:
    parts = {"optimizer": train.offload_optimizer, "param": train.offload_param}
    return [part for part, offloaded in parts.items() if offloaded]


def needs_compiler(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration asks for an Adam that is built when first used."""
    return _lookup(config, "optimizer.params.torch_adam") is not True


def check_precision(train: TrainConfig, use_gpu: bool) -> None:
    """Check that the workers can compute in what is configured.

    Raises:
        ConfigurationError: They cannot.
    """
    if train.fp16 and not use_gpu:
        raise ConfigurationError(
            "train.fp16=true needs GPUs; training runs on CPUs, where DeepSpeed has no float16. "
            "Use train.bf16, or train on GPUs."
        )


def _lookup(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
