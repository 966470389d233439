"""The LMs that programs, adapters and DSPy's settings hold, put under a conductor.

They are found in lists, dicts and tuples as well, but not inside other objects.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import dspy

from serve.dspy_lm import Conductor, governed

MAX_HELD = 10_000
"""What is longer is data, and holds no LMs."""


def govern(holders: Iterable[Any], conductor: Conductor) -> None:
    """Put governed LMs in the place of those that are attributes of objects, or inside these."""
    known: dict[int, Any] = {}
    for holder in holders:
        _governed(vars(holder), conductor, known, copied=False)


def with_governed(settings: Mapping[str, Any], conductor: Conductor) -> dict[str, Any]:
    """The settings with governed LMs in them; those that are given stay as they are."""
    found: dict[str, Any] = _governed(dict(settings), conductor, {}, copied=True)
    return found


def _governed(value: Any, conductor: Conductor, known: dict[int, Any], *, copied: bool) -> Any:
    if isinstance(value, dspy.BaseLM):
        return governed(value, conductor)
    if not isinstance(value, dict | list | tuple) or len(value) > MAX_HELD:
        return value
    if isinstance(value, tuple):
        held = [_governed(each, conductor, known, copied=copied) for each in value]
        if all(new is old for new, old in zip(held, value, strict=True)):
            return value
        return type(value)._make(held) if hasattr(value, "_make") else tuple(held)
    if id(value) in known:
        # It may hold itself.
        return known[id(value)]
    known[id(value)] = target = copy.copy(value) if copied else value
    for name, each in list(target.items() if isinstance(target, dict) else enumerate(target)):
        found = _governed(each, conductor, known, copied=copied)
        if found is not each:
            target[name] = found
    return target
