"""The section of what is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.config.section import Positive, Section

SCRATCH = "scratch"
SCRATCH_SIZES: dict[str, dict[str, int]] = {
    "mini": {
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    },
}
"""What each size of a scratch student has otherwise than ``micro``."""


class ScratchConfig(Section):
    """A micro-student: a Llama trained from nothing. Sizes are named as in LlamaConfig.

    A name alone, such as ``mini``, stands for ``{size: mini}``. Parameters with a full
    vocabulary, whose matrix is both the first and the last: 4.5 million of ``micro``, 13
    million of ``mini``, 45 million of ``small``.
    """

    size: Literal["micro", "mini", "small"] = "micro"
    """Decides the keys that are not given."""
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    hidden_size: Annotated[int, Field(ge=16)] = 256
    intermediate_size: Annotated[int, Field(ge=16)] = 768
    num_hidden_layers: Positive = 4
    num_attention_heads: Positive = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each layer's output that training leaves out; the exported model has none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"size": given}
        if not isinstance(given, Mapping):
            return given
        # A wrong name is said by the field's own check.
        return SCRATCH_SIZES.get(str(given.get("size")), {}) | dict(given)

    @model_validator(mode="after")
    def _check(self) -> "ScratchConfig":
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide into "
                f"num_attention_heads={self.num_attention_heads} heads of an even size"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters, through peft: https://arxiv.org/abs/2106.09685."""

    r: Positive = 16
    """Rank of the matrices that are learned beside each frozen one."""
    alpha: Positive = 32
    """What they add is multiplied by ``alpha / r``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of their input that training leaves out."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the modules that get them; ``all-linear`` is every one but the output's."""


class StudentConfig(Section):
    """What is trained."""

    model: str = SCRATCH
    """``scratch``, a Hugging Face id, or a directory relative to the configuration file."""
    prompt: Literal["folded", "full"] = "folded"
    scratch: ScratchConfig = ScratchConfig()
    """``micro``, ``mini``, ``small``, or a mapping that may change a ``size``."""
    lora: LoraConfig | None = None
    """Trains adapters and not the model's own weights, which takes a fraction of the memory and
    a learning rate about ten times as high. Null trains every weight."""

    @model_validator(mode="after")
    def _check(self) -> "StudentConfig":
        if self.lora is not None and self.model == SCRATCH:
            raise ValueError(
                "lora adapts a model that has learned something; model=scratch has not. Leave "
                "lora out, or name a Hugging Face model"
            )
        return self
