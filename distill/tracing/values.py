"""Field values as JSON and back.

A trace keeps JSON values, as DSPy's adapters would write them; rows and metrics want the
values' own types again.
"""

import json
from collections.abc import Mapping
from typing import Any

import dspy
import pydantic
from dspy.adapters.utils import serialize_for_json

from serve.programs import RETURNED

_UNFIT = (pydantic.ValidationError, pydantic.errors.PydanticUserError, TypeError)


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Field values as JSON values."""
    return {name: serialize_for_json(value) for name, value in values.items()}


def as_shown(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as JSON values that adapters write into a prompt as they write the inputs.

    Where text is expected they write a list in one way, item by item, and every other
    collection in another.
    """
    shown = jsonable(values)
    for name, value in shown.items():
        if name not in fields or fields[name].annotation is not str or not isinstance(value, list):
            continue
        given = values[name]
        if isinstance(given, list):
            pairs = zip(value, given, strict=True)
            shown[name] = [plain if plain == item else str(item) for plain, item in pairs]
        else:
            shown[name] = json.dumps(value, ensure_ascii=False)
    return shown


def revive(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values as their fields' types.

    One that does not fit its type, or would be written in another way, stays as it is.
    """
    return {
        name: _validated(value, fields[name].annotation) if name in fields else value
        for name, value in values.items()
    }


def revive_prediction(values: Mapping[str, Any], program: dspy.Module) -> Any:
    """What a program returned, typed by its predictors' output fields of the same names."""
    if values.keys() == {RETURNED}:
        return values[RETURNED]
    fields: dict[str, Any] = {}
    for predictor in program.predictors():
        fields.update(predictor.signature.output_fields)
    return dspy.Prediction(revive(values, fields))


def _validated(value: Any, annotation: Any) -> Any:
    try:
        revived = pydantic.TypeAdapter(annotation).validate_python(value)
    except _UNFIT:
        # Adapters write plain JSON values as well; the type was a hint to them.
        return value
    # As a float, 5 would be written 5.0, which is not what was in the prompt.
    return revived if json.dumps(serialize_for_json(revived)) == json.dumps(value) else value
