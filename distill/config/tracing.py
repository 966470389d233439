"""The sections of what a student learns from: examples, a teacher, and how it is run."""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from distill.config.section import Positive, Section

# Whole words, so that max_tokens is none of them.
SECRET_KEY = re.compile(
    r"(?i)(^|[_-])(api_?key|key|token|secret|password|credentials|authorization)$"
)
SECRET_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")
OPEN_MODEL = "ray/"
"""Begins the name of a teacher that the run serves itself."""


class DataConfig(Section):
    """Where the examples are. Paths are relative to the configuration file."""

    train: str
    dev: str | None = None
    """Validation data; null splits it off ``train`` by example id."""
    test: str
    inputs: Annotated[list[str], Field(min_length=1)]
    columns: dict[str, str] = Field(default={})
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
    prices: dict[str, PriceConfig] = Field(default={})
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


def _find_secret(value: Any, path: str) -> str | None:
    """Where a setting holds what looks like a secret, if anywhere."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if SECRET_KEY.search(str(key)):
                return f"{path}.{key}"
            if found := _find_secret(inner, f"{path}.{key}"):
                return found
    return path if isinstance(value, str) and SECRET_URL.search(value) else None
