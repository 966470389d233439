"""Finds what keeps a value from being pickled, and says where it is."""

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import dspy

from distill import secrets

MAX_DEPTH = 12


def find(value: Any, path: str, depth: int = MAX_DEPTH) -> str | None:
    """The innermost part that cannot be pickled, as ``path.to.it: its type``.

    Args:
        value: Looked into.
        path: What the value is called.
        depth: How many levels to look into.

    Returns:
        None where the value can be pickled.
    """
    if _picklable(value):
        return None
    for name, part in _parts(value) if depth else ():
        inner = find(part, f"{path}{name}", depth - 1)
        if inner:
            return inner
    return f"{path}: {type(value).__module__}.{type(value).__qualname__}"


def _picklable(value: Any) -> bool:
    try:
        secrets.dumps(value)
    # Asked only whether it can be done; what it raises depends on the value.
    except Exception:
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, each part by what leads to it from the value."""
    if isinstance(value, type | types.ModuleType):
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", each) for key, each in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{number}]", each) for number, each in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("", part) for part in (value.func, value.args, value.keywords))
    elif inspect.ismethod(value):
        yield ".__self__", value.__self__
    elif inspect.isfunction(value):
        around = inspect.getclosurevars(value)
        yield from ((f" (uses {name})", each) for name, each in around.nonlocals.items())
        yield from ((f" (uses {name})", each) for name, each in around.globals.items())
    yield from ((f".{name}", each) for name, each in _attributes(value).items())


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that are pickled; a class may leave some of its own out."""
    attributes = getattr(value, "__dict__", {})
    try:
        reduced = value.__reduce_ex__(4)
    # A class's own code, which may be what keeps it from being pickled.
    except Exception:
        return dict(attributes)
    if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
        # Pydantic's state has the attributes one level down.
        attributes = {**reduced[2], **reduced[2].get("__dict__", {})}
        attributes.pop("__dict__", None)
    left_out = {"history"} if isinstance(value, dspy.BaseLM) else ()
    return {name: each for name, each in attributes.items() if name not in left_out}
