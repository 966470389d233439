"""An open-weight teacher, which the run serves itself: ``teacher.lm.model: ray/<id or folder>``.

Owns what its settings may be, what names it, and what it takes of the cluster. That it runs
while it is needed is ``tracing.service``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import dspy
from pydantic import Field

from distill.config import OPEN_MODEL, Positive, Section, TeacherConfig
from distill.config_file import validated
from distill.fingerprints import model_files
from distill.rows import Messages
from distill.tracing.actor import LmSpec
from distill.tracing.service import Service
from serve.dspy_lm import CONNECTION, model_name, served_lm
from serve.errors import ConfigurationError
from serve.models import check_model, full_name, is_hub_id

BATCH = 32
"""Requests that a replica answers at once."""


class OpenLmConfig(Section):
    """What ``teacher.lm`` takes for a model that the run serves itself."""

    model: str
    """``ray/`` and a Hugging Face id, or a folder relative to the configuration file."""
    max_tokens: Positive | None = None
    """Of an answer; null is the model's own limit, or 512."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """Null is 0: the likeliest answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    num_retries: Annotated[int, Field(ge=0)] = 3


def is_open(settings: Mapping[str, Any]) -> bool:
    """Whether ``teacher.lm`` names a model that the run serves itself."""
    return str(settings["model"]).startswith(OPEN_MODEL)


def lm_spec(settings: Mapping[str, Any]) -> LmSpec:
    """The LM of such ``teacher.lm``, named by its files and by how it samples.

    Where it runs, and where the folder lies, names no other teacher.

    Raises:
        ConfigurationError: A setting is wrong, or there is no such folder.
    """
    given = _checked(settings).model_dump(exclude_unset=True, exclude={"model"})
    model = _model_of(settings)
    check_model(model)
    contents = model if is_hub_id(model) else model_files(Path(model))
    sampling = {key: value for key, value in given.items() if key not in CONNECTION}
    return LmSpec(
        make=partial(served_lm, model, **given),
        identity={"teacher": {**sampling, "model": [OPEN_MODEL, contents]}},
    )


def service(teacher: TeacherConfig, say: Callable[[str], None]) -> Service | None:
    """What has to be served for the teacher to answer; None for one that others serve."""
    if not is_open(teacher.lm):
        return None
    model = _model_of(teacher.lm)
    return Service(model, model_name(model), teacher.num_replicas, say)


def num_cpus(teacher: TeacherConfig) -> int:
    """CPUs that the teacher's replicas take."""
    if not is_open(teacher.lm):
        return 0
    from serve.deployments import STUDENT_CPUS

    return teacher.num_replicas * STUDENT_CPUS


def most_in_flight(teacher: TeacherConfig, asked: int) -> int:
    """How many of so many calls in flight the teacher works on at once."""
    return min(asked, teacher.num_replicas * BATCH) if is_open(teacher.lm) else asked


def check(settings: Mapping[str, Any], prompts: Sequence[Messages]) -> None:
    """See that the model can be loaded and asked, without loading its weights.

    Args:
        settings: ``teacher.lm``.
        prompts: Full prompts that its chat template has to render.

    Raises:
        ConfigurationError: It cannot.
    """
    lm_spec(settings)
    # Imported here: it brings torch, which other teachers do not need.
    from distill.training.base_model import check_base_model

    check_base_model(_model_of(settings), prompts, "teacher.lm.model")


def check_none_inside(program: dspy.Module) -> None:
    """See that no predictor has such a model for an LM of its own.

    Raises:
        ConfigurationError: One has.
    """
    for name, predictor in program.named_predictors():
        if predictor.lm is not None:
            check_elsewhere(f"The LM of {name}", predictor.lm)


def check_elsewhere(what: str, lm: dspy.BaseLM) -> None:
    """See that an LM which is no ``teacher.lm`` has no such model.

    Raises:
        ConfigurationError: It has.
    """
    if lm.model.startswith(OPEN_MODEL):
        name = lm.model.removeprefix(OPEN_MODEL)
        raise ConfigurationError(
            f"{what} is {lm.model}; only teacher.lm.model of a configuration file may be such a "
            f'name. Use lm = dspy.LM("raydistill/{name}", provider=RayProvider()), and lm.launch() '
            "before and lm.kill() after."
        )


def _checked(settings: Mapping[str, Any]) -> OpenLmConfig:
    checked: OpenLmConfig = validated(OpenLmConfig, settings, "teacher.lm")
    return checked


def _model_of(settings: Mapping[str, Any]) -> str:
    name = str(settings["model"]).removeprefix(OPEN_MODEL)
    if not name or "://" in name:
        raise ConfigurationError(
            f"teacher.lm.model={settings['model']}: expected {OPEN_MODEL} and a Hugging Face id, "
            "or a folder that all nodes share."
        )
    return full_name(name)
