"""The keys of a run's configuration: their types, defaults and bounds, a module for each part.

Reading the YAML file, and what is said of a wrong key or value, is ``config_file``. Whether
files exist, programs import or the cluster is large enough is for ``preflight``.
"""

from distill.config.run import RunConfig, ServeConfig
from distill.config.section import Positive, Section
from distill.config.student import SCRATCH, LoraConfig, ScratchConfig, StudentConfig
from distill.config.tracing import (
    OPEN_MODEL,
    SECRET_KEY,
    SECRET_URL,
    ActorsConfig,
    DataConfig,
    PriceConfig,
    TeacherConfig,
    TraceConfig,
)
from distill.config.train import LongRows, SchedulerType, SelectBy, TrainConfig

__all__ = [
    "OPEN_MODEL",
    "SCRATCH",
    "SECRET_KEY",
    "SECRET_URL",
    "ActorsConfig",
    "DataConfig",
    "LongRows",
    "LoraConfig",
    "Positive",
    "PriceConfig",
    "RunConfig",
    "SchedulerType",
    "ScratchConfig",
    "Section",
    "SelectBy",
    "ServeConfig",
    "StudentConfig",
    "TeacherConfig",
    "TraceConfig",
    "TrainConfig",
]
