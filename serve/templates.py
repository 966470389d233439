"""Text templates learned from an adapter's renderings.

Owns how a text is told apart into literals and values, and how the literals are learned
by rendering sentinels. What the texts are (prompts, completions) is for ``folding``.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations
from typing import Any

logger = logging.getLogger(__name__)

# Fields that may vanish when empty are learned in all combinations up to this many.
_MAX_VANISHING = 4


@dataclass(frozen=True)
class _Pattern:
    """A text with holes: ``literals[0] value literals[1] value ... literals[-1]``."""

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    """The field that each hole holds, by its place in the signature."""

    def match(self, text: str, num_fields: int) -> list[str] | None:
        """The fields' values, "" for a field without a hole; None if the text differs."""
        first, *middle, last = self.literals if self.slots else (*self.literals, "")
        end = len(text) - len(last)
        if not text.startswith(first) or not text.endswith(last) or end < len(first):
            return None
        values = [""] * num_fields
        start = len(first)
        for slot, literal in zip(self.slots, middle, strict=False):
            at = text.find(literal, start, end)
            if at < 0:
                return None
            values[slot] = text[start:at]
            start = at + len(literal)
        if self.slots:
            values[self.slots[-1]] = text[start:end]
        elif start != end:
            return None
        return values

    def fill(self, values: Sequence[str]) -> str:
        holes = [values[slot] for slot in self.slots]
        return "".join(
            literal + hole for literal, hole in zip(self.literals, [*holes, ""], strict=True)
        )


@dataclass(frozen=True)
class Template:
    """The ways in which one kind of text is laid out.

    The first pattern holds every field; the others lack fields that leave no trace of a
    hole when they are empty, as at an end that the adapter strips.
    """

    num_fields: int
    patterns: tuple[_Pattern, ...]

    def match(self, text: str) -> list[str] | None:
        for pattern in self.patterns:
            values = pattern.match(text, self.num_fields)
            if values is not None and self.fill(values) == text:
                return values
        return None

    def fill(self, values: Sequence[str]) -> str:
        empty = {index for index, value in enumerate(values) if not value}
        fields = range(self.num_fields)
        lacks = [(set(fields) - set(pattern.slots), pattern) for pattern in self.patterns]
        # The pattern that lacks most of what is empty here, and nothing else.
        fitting = [(len(lack), pattern) for lack, pattern in lacks if lack <= empty]
        return max(fitting, key=lambda item: item[0])[1].fill(values)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads, as plain JSON values."""
        patterns = [{"literals": list(p.literals), "slots": list(p.slots)} for p in self.patterns]
        return {"num_fields": self.num_fields, "patterns": patterns}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Template":
        """Read what ``to_json`` wrote; any damage raises KeyError, TypeError or ValueError."""
        patterns = [_Pattern(tuple(p["literals"]), tuple(p["slots"])) for p in data["patterns"]]
        return cls(data["num_fields"], tuple(patterns))


def learn_template(names: Sequence[str], render: Callable[[dict[str, Any]], str]) -> Template:
    """Learn a template from renderings of sentinels in these fields.

    Raises:
        ValueError: A field is not rendered exactly once.
    """
    fields = range(len(names))
    base = _learn_pattern(names, render, {})

    def without(absent: Sequence[int]) -> _Pattern | None:
        """The pattern where these fields are empty, if the base does not fit it."""
        blanks: tuple[Any, ...] = ("", [])
        for blank in blanks:
            empties = dict.fromkeys(absent, blank)
            text = _try(render, _values(names, empties, ["x"] * len(names)))
            if text is not None and base.match(text, len(names)) is None:
                return _learn_pattern(names, render, empties)
        return None

    vanishing = [index for index in fields if without([index])]
    subsets = [
        subset
        for size in range(1, min(len(vanishing), _MAX_VANISHING) + 1)
        for subset in combinations(vanishing, size)
    ]
    variants = [pattern for subset in subsets if (pattern := without(subset))]
    return Template(len(names), (base, *variants))


def _learn_pattern(
    names: Sequence[str], render: Callable[[dict[str, Any]], str], empties: Mapping[int, Any]
) -> _Pattern:
    """The pattern of these fields where some have the given, empty value.

    Strings, numbers and lists may be laid out differently (quotes, nested tags): what
    strings and lists have in common is the scaffold.
    """
    sentinels = [f"Sentinel{index}End" for index in range(len(names))]
    kept = {index: text for index, text in enumerate(sentinels) if index not in empties}
    pattern = _cut(render(_values(names, empties, sentinels)), kept)
    lists = _try(render, _values(names, empties, [[text] for text in sentinels]))
    return pattern if lists is None else _common(pattern, _cut(lists, kept))


def _values(
    names: Sequence[str], empties: Mapping[int, Any], values: Sequence[Any]
) -> dict[str, Any]:
    return {
        name: empties.get(index, value)
        for index, (name, value) in enumerate(zip(names, values, strict=True))
    }


def _try(render: Callable[[dict[str, Any]], str], values: dict[str, Any]) -> str | None:
    try:
        return render(values)
    # An adapter that cannot lay out an unusual value only leaves less to learn from.
    except Exception as error:
        logger.debug("the adapter does not render %r: %r", values, error)
        return None


def _cut(text: str, sentinels: Mapping[int, str]) -> _Pattern:
    """Cut a rendering at its sentinels, each of which must be in it exactly once."""
    for index, sentinel in sentinels.items():
        count = text.count(sentinel)
        if count != 1:
            raise ValueError(f"the adapter renders field {index + 1} {count} times, not once")
    slots = sorted(sentinels, key=lambda index: text.find(sentinels[index]))
    literals = []
    for slot in slots:
        literal, _, text = text.partition(sentinels[slot])
        literals.append(literal)
    return _Pattern((*literals, text), tuple(slots))


def _common(left: _Pattern, right: _Pattern) -> _Pattern:
    """What two renderings of the same fields have in common around their holes."""
    if left.slots != right.slots or not left.slots:
        return left
    literals = [_overlap(*pair) for pair in zip(left.literals, right.literals, strict=True)]
    prefix = _common_prefix(left.literals[0], right.literals[0])
    suffix = _common_prefix(left.literals[-1][::-1], right.literals[-1][::-1])[::-1]
    return _Pattern((prefix, *literals[1:-1], suffix), left.slots)


def _overlap(left: str, right: str) -> str:
    found = SequenceMatcher(None, left, right, autojunk=False).find_longest_match()
    return left[found.a : found.a + found.size]


def _common_prefix(left: str, right: str) -> str:
    size = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    return left[:size]
