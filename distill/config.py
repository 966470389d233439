"""The keys of a run's configuration: their types, defaults and bounds.

Reading the YAML file, and what is said of a wrong key or value, is ``config_file``. Whether
files exist, programs import or the cluster is large enough is for ``preflight``.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

# Whole words, so that max_tokens is none of them.
SECRET_KEY = re.compile(
    r"(?i)(^|[_-])(api_?key|key|token|secret|password|credentials|authorization)$"
)
SECRET_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")

SCRATCH = "scratch"
OPEN_MODEL = "ray/"
"""Begins the name of a teacher that the run serves itself."""
SCRATCH_RECIPE = {
    "learning_rate": 1e-3,
    "num_train_epochs": 12,
    "per_device_train_batch_size": 32,
    "weight_decay": 0.1,
}
"""What a micro-student learns Banking77 with; fine-tuning's defaults would teach it nothing."""
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
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Where the examples are. Paths are relative to the configuration file."""

    train: str
    dev: str | None = None
    """Validation data; null splits it off ``train`` by example id."""
    test: str
    inputs: Annotated[list[str], Field(min_length=1)]
    columns: dict[str, str] = {}
    """Renames: column in the file -> field of the example."""
    limit: Positive | None = None
    """Use only the first so many examples of each file."""


class TeacherConfig(Section):
    """The teacher: what ``dspy.LM`` takes. Secrets come from the environment."""

    lm: dict[str, Any]
    """Of a model ``ray/...``, see ``open_teacher.OpenLmConfig``."""
    num_replicas: Positive = 1
    """Of a model ``ray/...``; each takes a GPU where the cluster has any, else a CPU."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if not isinstance(self.lm.get("model"), str):
            raise ValueError("teacher.lm needs a model, such as {model: openai/gpt-4o-mini}")
        secret = _find_secret(self.lm, "teacher.lm")
        if secret:
            raise ValueError(
                f"{secret} would put a secret into the run directory. Set it in the "
                "environment instead, as OPENAI_API_KEY=... or your provider's own variable"
            )
        if self.num_replicas > 1 and not self.lm["model"].startswith(OPEN_MODEL):
            raise ValueError(
                f"num_replicas is for a model that the run serves, as {OPEN_MODEL}<Hugging Face id>"
            )
        return self


class PriceConfig(Section):
    """A model's price, in USD per million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class ActorsConfig(Section):
    """Between how many actors tracing may have."""

    min: Positive = 1
    """What the cluster must have room for."""
    max: Positive

    @model_validator(mode="after")
    def _check(self) -> "ActorsConfig":
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class TraceConfig(Section):
    """How the teacher is run over the trainset."""

    model_config = ConfigDict(serialize_by_alias=True)

    # By its kind, so that an error speaks of the kind that was given.
    actors: Annotated[
        Annotated[Positive, Tag("int")] | Annotated[ActorsConfig, Tag("range")],
        Discriminator(lambda given: "int" if isinstance(given, int | str | float) else "range"),
    ] = 2
    """So many, or ``{min, max}``: more come as there is work and room for them."""
    concurrency: Positive = 32
    """Examples in flight per actor."""
    samples: Positive = 1
    """Runs of each example; those after the first with a temperature."""
    keep: Literal["passed", "all", "best", "first"] = "passed"
    """Which runs of an example become rows: all that pass the metric, the best of these by
    score, or the first of them; ``all`` takes every one that finished."""
    hints: bool = False
    """Run an example of which no run passed once more, with the label as a hint."""
    imports: list[str] = Field(default=[], alias="import")
    """JSONL files, of traces or of ``{"messages": [...]}``, that become rows as well."""
    metric_threshold: float | None = None
    """Lowest score that passes; null lets every true score pass."""
    requests_per_minute: Positive | None = None
    """Of all actors together, over every sliding minute."""
    tokens_per_minute: Positive | None = None
    """Prompt and completion tokens, likewise."""
    call_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """For one attempt of one call."""
    max_retries: Annotated[int, Field(ge=0)] | None = None
    """Attempts of a call after its first; null is ``num_retries`` of the LM, whose default is 3.

    Only what may pass is tried again; what fails while the teacher is down does not count.
    """
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    prices: dict[str, PriceConfig] = {}
    """By model, where DSPy's own are wrong or missing."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.2

    @property
    def min_actors(self) -> int:
        """How many actors there are at least."""
        return self.actors if isinstance(self.actors, int) else self.actors.min

    @property
    def max_actors(self) -> int:
        """How many actors there are at most."""
        return self.actors if isinstance(self.actors, int) else self.actors.max


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
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
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
    long_rows: Literal["drop", "keep_start", "keep_end"] = "drop"
    """A longer row is left out, or cut to its first or last tokens if these hold any answer."""
    packing: bool = False
    """Rows share sequences, unseen by each other; a micro batch is of so many sequences."""
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the prompt's tokens in the loss; null is 0, or 0.3 for a scratch student."""
    bf16: bool | Literal["auto"] = "auto"
    """Computes in bfloat16; ``auto`` where every processor does and ``fp16`` is not set. Without
    it and ``fp16``, in float32."""
    fp16: bool = False
    """Computes in float16 with a loss scale that adapts itself; on GPUs only."""
    gradient_checkpointing: bool = False
    """Computes each layer again in the backward pass: less memory, about a third slower."""
    logging_steps: Positive = 10
    eval_strategy: Literal["epoch", "steps"] = "epoch"
    """When the validation rows are answered. ``epoch``: after each. ``steps``: after each and
    every ``eval_steps`` optimizer steps; each of these may give the student."""
    eval_steps: Positive = 500
    select_by: Literal["exact", "loss", "metric"] = "exact"
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
    report_to: list[Literal["mlflow", "wandb"]] = []
    """What is told of the training besides TensorBoard's files. Where it is, and with which
    account, is for its own environment variables to say."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    deepspeed: dict[str, Any] = {}
    """Merged over the generated DeepSpeed configuration."""

    @model_validator(mode="after")
    def _check_choice(self) -> "TrainConfig":
        if self.select_by != "exact" and self.save_strategy == "no":
            raise ValueError(
                f"select_by={self.select_by} chooses among checkpoints, and save_strategy=no keeps "
                "only the last. Use save_strategy=epoch"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer=true needs zero_stage 1, 2 or 3; found 0. Raise zero_stage"
            )
        if self.offload_param and self.zero_stage != 3:
            raise ValueError(
                f"offload_param=true needs zero_stage=3; found {self.zero_stage}. Set "
                "zero_stage=3, or offload_optimizer alone"
            )
        if self.fp16 and self.bf16 is True:
            raise ValueError(
                "fp16 and bf16 are both true; a model trains in one of them. Leave one out"
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


class ReplicasConfig(Section):
    """How many replicas an endpoint may have."""

    min: Positive = 1
    max: Positive = 4

    @model_validator(mode="after")
    def _check(self) -> "ReplicasConfig":
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class ServeConfig(Section):
    """How the student is served."""

    replicas: ReplicasConfig = ReplicasConfig()
    api_key_env: str | None = None
    """Name of the environment variable that holds the key callers must send."""


class RunConfig(Section):
    """One run, from examples to a served student."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    storage: str = "runs"
    program: ImportPath
    metric: ImportPath | None = None
    setup: ImportPath | None = None
    """Called with the program once in each process that runs it, before its first example."""
    data: DataConfig
    teacher: TeacherConfig
    trace: TraceConfig = TraceConfig()
    student: StudentConfig = StudentConfig()
    train: TrainConfig = Field(default=TrainConfig(), validate_default=True)
    serve: ServeConfig = ServeConfig()

    @field_validator("train")
    @classmethod
    def _fit(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        # A wrong student section is not in info.data, and is an error of its own.
        student = info.data.get("student")
        return train.fitted_to(student.model) if student else train

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.trace.metric_threshold is not None and self.metric is None:
            raise ValueError("trace.metric_threshold needs a metric; none is given")
        return self


def _find_secret(value: Any, path: str) -> str | None:
    """Where a setting holds what looks like a secret, if anywhere."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if SECRET_KEY.search(str(key)):
                return f"{path}.{key}"
            if found := _find_secret(inner, f"{path}.{key}"):
                return found
    return path if isinstance(value, str) and SECRET_URL.search(value) else None
