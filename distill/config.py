"""The run's configuration: one YAML file, validated whole before anything runs.

Owns the keys, their types, defaults and bounds, the ``key.path=value`` overrides of the
command line, and the messages for a wrong key or value. Whether files exist, programs
import or the cluster is large enough is for ``preflight``.
"""

import difflib
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.errors import ConfigurationError

# Whole words, so that max_tokens is none of them.
SECRET_KEY = re.compile(
    r"(?i)(^|[_-])(api_?key|key|token|secret|password|credentials|authorization)$"
)
SECRET_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")

SCRATCH = "scratch"
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
        return self


class TraceConfig(Section):
    """How the teacher is run over the trainset."""

    actors: Positive = 2
    concurrency: Positive = 32
    """Examples in flight per actor."""
    keep: Literal["passed", "all"] = "passed"
    """``passed`` keeps the examples that pass the metric, ``all`` every one that finished."""
    metric_threshold: float | None = None
    """Lowest score that passes; null lets every true score pass."""
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.2


class ScratchConfig(Section):
    """A micro-student: a Llama trained from nothing. Sizes are named as in LlamaConfig."""

    vocab_size: Annotated[int, Field(ge=300)] = 4096
    hidden_size: Annotated[int, Field(ge=16)] = 256
    intermediate_size: Annotated[int, Field(ge=16)] = 768
    num_hidden_layers: Positive = 4
    num_attention_heads: Positive = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each layer's output that training leaves out; the exported model has none."""

    @model_validator(mode="after")
    def _check(self) -> "ScratchConfig":
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide into "
                f"num_attention_heads={self.num_attention_heads} heads of an even size"
            )
        return self


class StudentConfig(Section):
    """What is trained."""

    model: str = SCRATCH
    """``scratch``, a Hugging Face id, or a directory relative to the configuration file."""
    prompt: Literal["folded", "full"] = "folded"
    scratch: ScratchConfig = ScratchConfig()


class TrainConfig(Section):
    """How it is trained: the names of ``transformers.TrainingArguments``."""

    num_workers: Positive = 2
    use_gpu: bool | Literal["auto"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 2
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    num_train_epochs: Positive = 3
    per_device_train_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=8)] = 4096
    """Tokens; a longer row is left out and counted."""
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the prompt's tokens in the loss; null is 0, or 0.3 for a scratch student."""
    bf16: bool | Literal["auto"] = "auto"
    logging_steps: Positive = 10
    seed: int = 0
    deepspeed: dict[str, Any] = {}
    """Merged over the generated DeepSpeed configuration."""


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
    data: DataConfig
    teacher: TeacherConfig
    trace: TraceConfig = TraceConfig()
    student: StudentConfig = StudentConfig()
    train: TrainConfig = TrainConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.trace.metric_threshold is not None and self.metric is None:
            raise ValueError("trace.metric_threshold needs a metric; none is given")
        return self


def load_config(path: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a configuration file.

    Args:
        path: The YAML file. Relative paths inside it are relative to its folder.
        overrides: ``key.path=value`` strings; the value is read as YAML. Paths given
            here are relative to the working directory, as a shell user expects.

    Raises:
        ConfigurationError: The file cannot be read, or what it says is not valid; the
            message names each wrong key with the nearest known one, or the expected value.
    """
    source = Path(path)
    tree = _read_yaml(source)
    for override in overrides:
        _apply_override(tree, override)
    _resolve_paths(tree, source.parent.resolve(), {o.split("=", 1)[0] for o in overrides})
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        details = "\n".join(dict.fromkeys(_explain(item) for item in error.errors()))
        raise ConfigurationError(f"{source}: {details}") from None


def _read_yaml(source: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(source.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{source}: no such configuration file.") from None
    except OSError as error:
        raise ConfigurationError(f"{source}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{source}: is not a text file; expected YAML.") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigurationError(f"{source}: is not valid YAML: {where}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigurationError(f"{source}: expected keys such as name: and data:, found {found}.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigurationError(
            f"{override!r} is not an override; expected key.path=value, as train.num_workers=1."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"{override!r}: the value is not valid YAML.") from None
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigurationError(f"{override!r}: {key} holds a value, not further keys.")
        node = child
    node[keys[-1]] = value


def _resolve_paths(tree: dict[str, Any], folder: Path, overridden: set[str]) -> None:
    def base(path: str) -> Path:
        given = any(path == key or path.startswith(f"{key}.") for key in overridden)
        return Path.cwd() if given else folder

    def resolve(section: Any, key: str, path: str) -> None:
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and not _is_uri(value):
            section[key] = str(base(path) / value)

    tree.setdefault("storage", "runs")
    resolve(tree, "storage", "storage")
    for key in ("train", "dev", "test"):
        resolve(tree.get("data"), key, f"data.{key}")
    student = tree.get("student")
    if isinstance(student, dict) and isinstance(model := student.get("model"), str):
        path = base("student.model") / Path(model).expanduser()
        # A Hugging Face id looks like a relative path; a directory that is there wins.
        if model.startswith((".", "/", "~")) or (model != "scratch" and path.is_dir()):
            student["model"] = str(path)


def _find_secret(value: Any, path: str) -> str | None:
    """Where a setting holds what looks like a secret, if anywhere."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if SECRET_KEY.search(str(key)):
                return f"{path}.{key}"
            if found := _find_secret(inner, f"{path}.{key}"):
                return found
    return path if isinstance(value, str) and SECRET_URL.search(value) else None


def _is_uri(value: str) -> bool:
    return bool(re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", value))


def _explain(error: Any) -> str:
    keys = [str(part) for part in error["loc"] if not _is_union_branch(part)]
    path = ".".join(keys)
    if error["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}."
        return f"{path}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{path}: is missing; it is required."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        message = (
            "expected an import path, package.module:name"
            if keys[-1] in ("program", "metric")
            else "expected letters, digits, '.', '_' and '-'"
        )
    found = "" if error["type"] == "value_error" else f", found {error['input']!r}"
    return f"{path}: {message}{found}." if path else f"{message}."


def _is_union_branch(part: Any) -> bool:
    # pydantic names the branch of a union it tried as if it were a key.
    return isinstance(part, str) and (part in ("bool", "int", "float") or "[" in part)


def _known_keys(keys: list[str]) -> list[str]:
    model: Any = RunConfig
    for key in keys:
        model = model.model_fields[key].annotation
    return list(model.model_fields)
