"""Which texts a folded completion may be, as a regular expression.

Pure: it reads the types that ``student.json`` keeps of a predictor's outputs. Fields of a
closed set (Literal, Enum, bool, int, float) are held to it; other fields may hold anything
but the separator, so that an answer always has as many values as the signature has fields.
What decodes under the pattern is an engine's business.
"""

import re
from collections.abc import Mapping
from typing import Any

from serve.folding import SEPARATOR, escape

INTEGER = r"-?[0-9]{1,18}"
NUMBER = rf"{INTEGER}(\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,3}})?"
ANYTHING = rf"[^{SEPARATOR}]*"


def completion_pattern(outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """The pattern of a predictor's folded completions.

    Args:
        outputs: The output fields as the manifest describes them: each with a ``type``,
            a JSON schema, or the name of a type that has none.
    """
    return SEPARATOR.join(f"({_value_pattern(field['type'])})" for field in outputs.values())


def _value_pattern(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return ANYTHING
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return "|".join(_literal(value) for value in values)
    patterns = {"boolean": "True|False", "integer": INTEGER, "number": NUMBER}
    return patterns.get(str(schema.get("type")), ANYTHING)


def _literal(value: Any) -> str:
    # DSPy writes a value as str() does. Only what has a meaning is escaped: dialects of
    # regular expressions differ in what else they let be.
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", escape(str(value)))
