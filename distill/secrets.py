"""Keeps API keys out of what is pickled, logged and stored.

A text goes into a pickle with the name of an environment variable in the place of each key that
it holds, whoever holds the text. ``dumps`` sets the variables here; whoever calls ``loads``
elsewhere is handed ``variables`` first. ``scrubbed`` takes the keys out of a text.
"""

import hashlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from typing import Any

import cloudpickle
import dspy

from distill.config import SECRET_KEY
from serve.errors import ConfigurationError

MIN_CHARS = 8
"""Shorter values are words that a text may hold by chance, as ``none`` and ``EMPTY``."""
_VARIABLE = re.compile(r"RAYDISTILL_[0-9A-F]{16}_KEY")


def dumps(value: Any) -> bytes:
    """Pickle a value as cloudpickle does, without keys; LMs go without their history.

    Keys are the values of environment variables and of settings of the LMs in it, where those
    are named like keys.

    Raises:
        Exception: Something in it cannot be pickled.
    """
    keys = set(_in_environment().values())
    while True:
        with io.BytesIO() as file:
            pickler = _Pickler(file, keys)
            pickler.dump(value)
            payload = file.getvalue()
        if pickler.found <= keys:
            return payload
        # A key may have been written before the LM was met whose key it is.
        keys |= pickler.found


def loads(payload: bytes) -> Any:
    """Load what ``dumps`` wrote.

    Raises:
        ConfigurationError: This process lacks one of the variables that it needs.
        Exception: Something in it cannot be loaded.
    """
    return _Unpickler(io.BytesIO(payload)).load()


def variables() -> dict[str, str]:
    """The environment variables that this process has set for its pickles."""
    return {name: value for name, value in os.environ.items() if _VARIABLE.fullmatch(name)}


def scrubbed(text: str) -> str:
    """The text without the values of environment variables that are named like keys."""
    return _any_of(set(_in_environment().values())).sub("***", text)


class _Pickler(cloudpickle.CloudPickler):
    """Writes these keys as variables, and collects the keys of the LMs that it meets."""

    def __init__(self, file: io.BytesIO, keys: set[str]) -> None:
        super().__init__(file)
        self.found: set[str] = set()
        self._key = _any_of(keys)
        self._histories: dict[int, list[Any]] = {}

    def persistent_id(self, thing: Any) -> tuple[str, ...] | None:
        kind = type(thing)
        if kind is str:
            return self._sealed("str", thing)
        if kind is bytes:
            return self._sealed("bytes", thing.decode("latin-1"))
        # What was asked before is nobody's business elsewhere, and is large.
        if id(thing) in self._histories:
            return ("list",)
        if isinstance(thing, dspy.BaseLM):
            settings = dict(vars(thing))
            history = settings.pop("history", None)
            if isinstance(history, list):
                self._histories[id(history)] = history
            self.found.update(_keys_in(settings))
        return None

    def _sealed(self, kind: str, text: str) -> tuple[str, ...] | None:
        """The text in parts, each second one the variable of a key; None without keys."""
        parts = self._key.split(text)
        if len(parts) == 1:
            return None
        parts[1::2] = map(_seal, parts[1::2])
        return kind, *parts


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        kind, *parts = pid
        if kind == "list":
            return []
        parts[1::2] = map(_opened, parts[1::2])
        text = "".join(parts)
        return text.encode("latin-1") if kind == "bytes" else text


def _in_environment() -> dict[str, str]:
    """The environment variables that hold a key."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= MIN_CHARS and SECRET_KEY.search(name)
    }


def _keys_in(settings: dict[str, Any]) -> Iterator[str]:
    """The values that are named like keys, also inside of others."""
    pending: list[Any] = [settings]
    seen: set[int] = set()
    while pending:
        holder = pending.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for name, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, dict | list | tuple):
                pending.append(value)
            elif isinstance(value, str) and len(value) >= MIN_CHARS:
                yield from [value] if SECRET_KEY.search(str(name)) else []


def _any_of(keys: set[str]) -> re.Pattern[str]:
    # The longest first: a key may begin as another one does.
    longest_first = sorted(keys, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _seal(key: str) -> str:
    # A hash tells nobody the key, and gives equal keys one name.
    variable = f"RAYDISTILL_{hashlib.sha256(key.encode()).hexdigest()[:16].upper()}_KEY"
    os.environ[variable] = key
    return variable


def _opened(variable: str) -> str:
    if variable not in os.environ:
        raise ConfigurationError(
            f"An API key was left out of a pickle, and {variable}, which should hold it, is "
            "not set in this process. Load it in the process that made it, or hand the key over."
        )
    return os.environ[variable]
