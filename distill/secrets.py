"""Keeps API keys out of what is pickled, logged and stored.

An object goes into a pickle with the name of an environment variable in the place of each of
its keys. ``dumps`` sets the variable here; whoever loads the pickle elsewhere is handed
``variables`` first. ``scrubbed`` takes the keys out of a text.
"""

import hashlib
import io
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
import dspy

from distill.config import SECRET_KEY
from serve.errors import ConfigurationError

MIN_CHARS = 8
"""Shorter values are words that a text may hold by chance, as ``none`` and ``EMPTY``."""
_VARIABLE = re.compile(r"RAYDISTILL_[0-9A-F]{16}_KEY")


@dataclass(frozen=True)
class _Sealed:
    """Stands in a pickle for the value of an environment variable."""

    variable: str


def dumps(value: Any) -> bytes:
    """Pickle a value that may hold LMs and other things with keys.

    Keys are an LM's settings that are named like one, whatever holds them, and the attributes
    of any object that are named like one and have an environment variable's value.

    Raises:
        Exception: Something in it cannot be pickled.
    """
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def variables() -> dict[str, str]:
    """The environment variables that this process has set for its pickles."""
    return {name: value for name, value in os.environ.items() if _VARIABLE.fullmatch(name)}


def scrubbed(text: str) -> str:
    """The text without the values of environment variables that are named like keys."""
    for name, value in os.environ.items():
        if len(value) >= MIN_CHARS and SECRET_KEY.search(name):
            text = text.replace(value, "***")
    return text


class _Pickler(cloudpickle.CloudPickler):
    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, dspy.BaseLM):
            return _reduced(thing, _sealed_lm)
        if _keys_of(thing):
            return _reduced(thing, _sealed_attributes)
        return super().reducer_override(thing)


def _reduced(thing: Any, sealed: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """How the thing is pickled, with its state sealed."""
    reduced: Any = thing.__reduce_ex__(4)
    if isinstance(reduced, str) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    function, arguments, state, *items = reduced[:5]
    items += [None] * (2 - len(items))
    return function, arguments, sealed(state), *items, _restore


def _restore(thing: Any, state: dict[str, Any]) -> None:
    opened = {name: _opened(value) for name, value in state.items()}
    if hasattr(thing, "__setstate__"):
        thing.__setstate__(opened)
    else:
        vars(thing).update(opened)


def _sealed_lm(state: Mapping[str, Any]) -> dict[str, Any]:
    # What was asked before is nobody's business elsewhere, and is large.
    found = {name: [] if name == "history" else value for name, value in state.items()}
    return {name: _sealed(name, value) for name, value in found.items()}


def _sealed(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _sealed(str(inner), each) for inner, each in value.items()}
    return _seal(value) if value and isinstance(value, str) and SECRET_KEY.search(name) else value


def _sealed_attributes(state: Mapping[str, Any]) -> dict[str, Any]:
    keys = _keys_in(state)
    return {name: _seal(value) if name in keys else value for name, value in state.items()}


def _keys_of(thing: Any) -> set[str]:
    state = getattr(thing, "__dict__", None)
    # A function or a class is pickled as code, by cloudpickle alone.
    is_code = isinstance(thing, type | types.FunctionType)
    return _keys_in(state) if isinstance(state, dict) and not is_code else set()


def _keys_in(state: Mapping[str, Any]) -> set[str]:
    named = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, str) and SECRET_KEY.search(name)
    }
    known = set(os.environ.values()) if named else set()
    return {name for name, value in named.items() if len(value) >= MIN_CHARS and value in known}


def _seal(value: str) -> _Sealed:
    # A hash tells nobody the key, and gives equal keys one name.
    variable = f"RAYDISTILL_{hashlib.sha256(value.encode()).hexdigest()[:16].upper()}_KEY"
    os.environ[variable] = value
    return _Sealed(variable)


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _opened(inner) for name, inner in value.items()}
    if not isinstance(value, _Sealed):
        return value
    if value.variable not in os.environ:
        raise ConfigurationError(
            f"An API key was left out of a pickle, and {value.variable}, which should hold it, is "
            "not set in this process. Load it in the process that made it, or hand the key over."
        )
    return os.environ[value.variable]
