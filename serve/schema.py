"""The types of ``POST /predict``: the program's inputs and outputs as pydantic models.

A field's type is what the program's own forward method says; where it says nothing, what
the predictor's field of the same name says; else anything.
"""

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dspy
import pydantic
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from serve.programs import entry_point


class Form(BaseModel):
    """A program's inputs or outputs. Its fields are known to callers by their alias."""

    # The program's own names are aliases: as attributes they might shadow pydantic's.
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def values(self) -> dict[str, Any]:
        """The values by the program's names, of the declared types."""
        fields = type(self).model_fields.items()
        return {str(info.alias): getattr(self, attribute) for attribute, info in fields}


def input_form(program: dspy.Module, names: Sequence[str]) -> type[Form]:
    """The model of what ``/predict`` takes.

    Inputs for which forward has a default may be left out.
    """
    forward = entry_point(program)
    parameters = inspect.signature(forward).parameters
    hints = _hints(forward)
    fields = {}
    for name in names:
        annotation, description = _describe(program, "input_fields", name)
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        required = default is inspect.Parameter.empty
        annotation = _usable(hints.get(name, annotation))
        fields[name] = (annotation, ... if required else default, description)
    return _form("Inputs", fields)


def output_form(program: dspy.Module, names: Sequence[str]) -> type[Form]:
    """The model of what ``/predict`` answers."""
    fields = {}
    for name in names:
        annotation, description = _describe(program, "output_fields", name)
        fields[name] = (_usable(annotation), ..., description)
    return _form("Outputs", fields)


def to_json(value: Any) -> Any:
    """A value of a prediction as JSON values; what has no JSON form becomes its text."""
    return TypeAdapter(Any).dump_python(value, mode="json", fallback=str)


def _form(title: str, fields: dict[str, tuple[Any, Any, str | None]]) -> type[Form]:
    definitions: dict[str, Any] = {
        f"field_{index}": (
            annotation,
            Field(default, alias=name, title=name, description=description),
        )
        for index, (name, (annotation, default, description)) in enumerate(fields.items())
    }
    return pydantic.create_model(title, __base__=Form, **definitions)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    # A hint may name what only exists for type checkers; the predictors' types remain.
    except (NameError, TypeError, AttributeError):
        return {}


def _describe(program: dspy.Module, side: str, name: str) -> tuple[Any, str | None]:
    """Type and description of the last predictor's field of this name."""
    for predictor in reversed(list(_predictors(program))):
        info = getattr(predictor.signature, side).get(name)
        if info is not None:
            description = (info.json_schema_extra or {}).get("desc")
            # DSPy's own placeholder for "no description".
            return info.annotation, None if description == f"${{{name}}}" else description
    return Any, None


def _predictors(program: dspy.Module) -> Iterator[Any]:
    return (predictor for _, predictor in program.named_predictors())


def _usable(annotation: Any) -> Any:
    """The annotation, or Any for one that cannot be read from JSON."""
    try:
        TypeAdapter(annotation).json_schema()
    except (pydantic.errors.PydanticUserError, TypeError):
        return Any
    return annotation
