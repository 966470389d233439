"""The section of how the student is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.config.section import Positive, Section
from distill.config.student import SCRATCH

LongRows = Literal["drop", "keep_start", "keep_end"]
SchedulerType = Literal["constant", "linear", "cosine"]
SelectBy = Literal["exact", "loss", "metric"]
SCRATCH_RECIPE = {
    "learning_rate": 1e-3,
    "num_train_epochs": 12,
    "per_device_train_batch_size": 32,
    "weight_decay": 0.1,
}
"""What a micro-student learns Banking77 with; fine-tuning's defaults would teach it nothing."""


class TrainConfig(Section):
    """How it is trained: the names of ``transformers.TrainingArguments``."""

    num_workers: Positive = 2
    use_gpu: bool | Literal["auto"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What the workers divide among them: 1 the optimizer's state, 2 and the gradients, 3 and
    the weights."""
    offload_optimizer: bool = False
    """Keeps the optimizer's state in the CPU's memory, and computes its steps there. Needs
    ``zero_stage`` 1 or more."""
    offload_param: bool = False
    """Keeps weights that are not in use in the CPU's memory. Needs ``zero_stage`` 3."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """The highest; 1e-3 for a scratch student, unless given."""
    lr_scheduler_type: SchedulerType = "cosine"
    num_train_epochs: Positive = 3
    """12 for a scratch student, unless given."""
    per_device_train_batch_size: Positive = 8
    """Rows of a worker in a micro batch; 32 for a scratch student, unless given."""
    gradient_accumulation_steps: Positive = 1
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the steps over which the learning rate rises."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which it rises, in the place of ``warmup_ratio``."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """0.1 for a scratch student, unless given."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=8)] = 4096
    """Tokens of a row, or of a sequence of packed rows; at most what the model takes."""
    long_rows: LongRows = "drop"
    """A longer row is left out, or cut to its first or last tokens if these hold any answer."""
    packing: bool = False
    """Rows share sequences, unseen by each other; a micro batch is of so many sequences."""
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the prompt's tokens in the loss; null is 0, or 0.3 for a scratch student."""
    bf16: bool | Literal["auto"] = "auto"
    """Computes in bfloat16; ``auto`` where every processor does and ``fp16`` is not set. Without
    it and ``fp16``, in float32."""
    fp16: bool = False
    """Computes in float16 with a loss scale that adapts itself; on GPUs only, and with
    ``zero_stage`` 1 or more."""
    gradient_checkpointing: bool = False
    """Computes each layer again in the backward pass: less memory, about a third slower."""
    logging_steps: Positive = 10
    eval_strategy: Literal["epoch", "steps"] = "epoch"
    """When the validation rows are answered. ``epoch``: after each. ``steps``: after each and
    every ``eval_steps`` optimizer steps; each of these may give the student."""
    eval_steps: Positive = 500
    select_by: SelectBy = "exact"
    """What the student is chosen by: ``exact``, the validation completions that it gives
    exactly, and of equals the lower loss; ``loss``, the validation loss; ``metric``, the
    program's own, with the kept checkpoints answering the dev set after training."""
    early_stopping_patience: Positive | None = None
    """Evaluations without a better one after which training ends; by loss or by exact, as
    ``select_by`` says, and for ``metric`` by exact. null: it never ends early."""
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When the state of training is saved, for an interrupted run to go on from.

    ``epoch``: after each. ``steps``: after each and every ``save_steps`` optimizer steps.
    The student is then the best one, by ``select_by``. ``no``: only at the end, so that an
    interrupted run starts anew; the student is the last one.
    """
    save_steps: Positive = 500
    save_total_limit: Positive | None = None
    """How many checkpoints are kept, the best ones; the latest is kept besides. null is 1, or
    3 where the metric is to choose among them."""
    report_to: list[Literal["mlflow", "wandb"]] = Field(default=[])
    """What is told of the training besides TensorBoard's files. Where it is, and with which
    account, is for its own environment variables to say."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    deepspeed: dict[str, Any] = Field(default={})
    """Merged over the generated DeepSpeed configuration."""

    @model_validator(mode="after")
    def _check_effect(self) -> "TrainConfig":
        """Refuse what was set and would do nothing."""
        choosing = ("select_by", "early_stopping_patience", "save_total_limit")
        needed = {
            **dict.fromkeys(choosing, ("save_strategy", self.save_strategy != "no", "epoch")),
            "save_steps": ("save_strategy", self.save_strategy == "steps", "steps"),
            "eval_steps": ("eval_strategy", self.eval_strategy == "steps", "steps"),
        }
        for key, (other, holds, value) in needed.items():
            # By value: a configuration that was written out again names every key.
            if not holds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}={getattr(self, key)} does nothing with {other}={getattr(self, other)}. "
                    f"Set {other}={value}, or leave {key} out"
                )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> "TrainConfig":
        if self.fp16 and self.bf16 is True:
            raise ValueError(
                "fp16 and bf16 are both true; a model trains in one of them. Leave one out"
            )
        if self.fp16 and self.zero_stage == 0:
            # DeepSpeed then divides gradients by a loss scale that it did not multiply with.
            raise ValueError("fp16=true needs zero_stage 1, 2 or 3; found 0. Raise zero_stage")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> "TrainConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer=true needs zero_stage 1, 2 or 3; found 0. Raise zero_stage"
            )
        if self.offload_param and self.zero_stage != 3:
            raise ValueError(
                f"offload_param=true needs zero_stage=3; found {self.zero_stage}. Set "
                "zero_stage=3, or offload_optimizer alone"
            )
        return self

    def fitted_to(self, model: str) -> "TrainConfig":
        """The same, with what was not given as a student of this model needs it."""
        if model != SCRATCH:
            return self
        return self.model_copy(
            update={
                key: value
                for key, value in SCRATCH_RECIPE.items()
                if key not in self.model_fields_set
            }
        )
