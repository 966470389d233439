"""Low-rank adapters around a base model, through peft, and what is left of them afterwards.

Owns how adapters are put on, and how they come off again: merged into the weights of a plain
model, and apart, in peft's own format. peft is optional, and imported where it is needed.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from distill.config import LoraConfig
from distill.extras import require
from serve.errors import ConfigurationError

ADAPTER_FOLDER = "adapter"
"""Where a student's adapter is, below its plain directory."""


def check_installed() -> None:
    """See that peft is there.

    Raises:
        ConfigurationError: It is not.
    """
    require("peft", "student.lora", "lora")


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> Any:
    """Freeze a model's weights and put adapters beside them.

    Returns:
        A ``PeftModel``; the adapters are of the model's own data type, as ZeRO-3 needs it.

    Raises:
        ConfigurationError: peft is missing, or ``target_modules`` names what cannot be adapted.
    """
    check_installed()
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    tied = _tied_modules(model)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigurationError(
            f"student.lora.target_modules={lora.target_modules!r} does not fit the model: {error} "
            "Use all-linear, or names of its linear layers."
        ) from error
    if tied & set(_adapted_modules(model)):
        raise ConfigurationError(
            f"student.lora.target_modules={lora.target_modules!r} names a layer whose weights "
            "are also another's, such as the first and the last of a model that ties them: "
            "merged, the adapter would change both. Leave it out, or use all-linear."
        )
    return adapted


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether a model has adapters on it."""
    return hasattr(model, "peft_config")


def plain_model(model: Any) -> PreTrainedModel:
    """The Hugging Face model, below its adapters if it has some."""
    return model.get_base_model() if is_adapted(model) else model


def merge(
    model: Any,
    weights: Mapping[str, torch.Tensor],
    gather: Callable[[list[torch.Tensor]], AbstractContextManager[Any]],
) -> dict[str, torch.Tensor]:
    """The weights that a plain model would have to be the same function without adapters.

    Args:
        model: A ``PeftModel``; nothing in it is changed.
        weights: Whole weights of ``plain_model(model)``, by name; empty on ranks that have none.
        gather: Makes a list of parameters whole, within its context. Every rank enters it.

    Returns:
        Named as if there never had been adapters.
    """
    deltas: dict[str, torch.Tensor] = {}
    for name, layer in _adapted_modules(plain_model(model)).items():
        with gather(list(layer.parameters())):
            if weights:
                (adapter,) = layer.active_adapters
                deltas[f"{name}.weight"] = layer.get_delta_weight(adapter).detach().cpu()
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        merged[name] = weight + deltas[name] if name in deltas else weight
    return merged


def save_adapter(model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter as peft reads it, which takes its base model besides.

    Args:
        model: A ``PeftModel``.
        weights: Whole weights of ``plain_model(model)``, by name.
        folder: Made here.
    """
    folder.mkdir(parents=True)
    config = model.peft_config[model.active_adapter]
    adapter = {
        f"base_model.model.{name.replace('.default.', '.')}": weight.contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {**config.to_dict(), "inference_mode": True}
    about = {key: sorted(v) if isinstance(v, set) else v for key, v in about.items()}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def _adapted_modules(model: PreTrainedModel) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def _tied_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules that share a weight with another."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}
