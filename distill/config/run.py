"""A whole configuration, and the section of how the student is served."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill.config.section import Positive, Section
from distill.config.student import StudentConfig
from distill.config.tracing import DataConfig, TeacherConfig, TraceConfig
from distill.config.train import TrainConfig

ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]


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
