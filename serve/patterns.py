"""Which texts a folded completion may be, as a regular expression.

Owns how the values of a predictor's output fields look once they are folded. That is
found out by writing values through the adapter, since adapters differ: ``True`` is
``true`` in JSON. A field of a closed set (Literal, Enum, bool) is held to its values, a
number to the form of numbers; any other may hold anything but the separator, so that an
answer always has as many values as the signature has fields. It knows signatures and
adapters only by their methods. What decodes under the pattern is an engine's business.
"""

import enum
import logging
import re
import typing
from dataclasses import dataclass
from typing import Any

import pydantic

from serve.folding import SEPARATOR, Folding

logger = logging.getLogger(__name__)

INTEGER = r"-?(0|[1-9][0-9]{0,17})"
NUMBER = rf"{INTEGER}(\.[0-9]{{1,20}})?([eE][+-]?[0-9]{{1,3}})?"
ANYTHING = rf"[^{SEPARATOR}]*"

_NUMBERS: dict[Any, tuple[str, tuple[Any, ...]]] = {
    int: (INTEGER, (0, 7, -12, 10**17)),
    float: (NUMBER, (0.5, -3.25, 2.0, 1e-07, 1e20)),
}
_SIMPLE: tuple[Any, ...] = ("x", 0, ["x"], [0], [], {}, None)


def completion_pattern(signature: Any, adapter: Any, folding: Folding, predictor: str) -> str:
    """The pattern of a predictor's folded completions.

    Args:
        signature: The predictor's ``dspy.Signature``.
        adapter: Writes and parses completions.
        folding: Folds the predictor's completions.
        predictor: The predictor's name in the program.
    """
    probe = _Probe(signature, adapter, folding, predictor)
    patterns = (
        _field_pattern(probe, name, info.annotation)
        for name, info in signature.output_fields.items()
    )
    return SEPARATOR.join(f"({pattern})" for pattern in patterns)


def _field_pattern(probe: "_Probe", name: str, annotation: Any) -> str:
    if annotation in _NUMBERS:
        pattern, samples = _NUMBERS[annotation]
        plain = all(probe.folded(name, number) == str(number) for number in samples)
        return pattern if plain else ANYTHING
    texts = [probe.folded(name, value) for value in _allowed(annotation)]
    if not texts or None in texts:
        return ANYTHING
    return "|".join(_literal(text) for text in texts if text is not None)


def _allowed(annotation: Any) -> list[Any]:
    """The values of a closed set; none for any other type."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if isinstance(annotation, enum.EnumMeta):
        return list(annotation)
    return [True, False] if annotation is bool else []


@dataclass(frozen=True)
class _Probe:
    """Writes completions with one value of interest."""

    signature: Any
    adapter: Any
    folding: Folding
    predictor: str

    def folded(self, name: str, value: Any) -> str | None:
        """The field's part of a folded completion; None where it would not be read back."""
        others = {
            field: _simple(info.annotation) for field, info in self.signature.output_fields.items()
        }
        # What no simple value fits is left out of the parsing, as far as an adapter lets it.
        hard = [field for field, simple in others.items() if simple is None and field != name]
        readable = self.signature
        for field in hard:
            readable = readable.delete(field)
        values = others | dict.fromkeys(hard, "x") | {name: value}
        try:
            text = self.adapter.format_assistant_message_content(self.signature, values)
            folded = self.folding.fold_completion(self.predictor, text)
            if folded is None or self.folding.unfold_completion(self.predictor, folded) != text:
                return None
            parsed = self.adapter.parse(readable, text)[name]
        # An adapter is the user's code, and raises what it likes for what it cannot read.
        except Exception as error:
            logger.info("%s=%r stays open: %r", name, value, error)
            return None
        if parsed != value or type(parsed) is not type(value):
            return None
        return folded.split(SEPARATOR)[list(others).index(name)]


def _simple(annotation: Any) -> Any:
    """Some value of the type, not empty if possible; None where no simple one fits."""
    try:
        kind = pydantic.TypeAdapter(annotation)
    except (pydantic.errors.PydanticUserError, TypeError):
        return None
    for value in (*_allowed(annotation)[:1], *_SIMPLE):
        try:
            kind.validate_python(value)
        except pydantic.ValidationError:
            continue
        return value
    return None


def _literal(text: str) -> str:
    # Only what has a meaning is escaped: dialects of regular expressions differ in what
    # else they let be.
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", text)
