"""Short hashes of values, code and state, equal in every process.

Owns what counts as the same. What is hashed for a program or a metric is ``programs``.
"""

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from pathlib import Path
from types import CodeType
from typing import Any

from distill.datasets import canonical_json

# What was asked so far, and DSPy's mark on what an optimizer has seen: neither changes an answer.
_NO_STATE = {"history", "_compiled"}
_OF_MODELS = {".json", ".safetensors", ".jinja"}


def fingerprint(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:24]


def model_files(folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether a folder holds the same model still: its files' names, sizes and times.

    Weights are too large to be read for it.
    """
    files = (path for path in sorted(folder.iterdir()) if path.suffix in _OF_MODELS)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def state_of(thing: Any) -> dict[str, Any]:
    """A thing's attributes: their values where these have a JSON form, else their types."""
    state = getattr(thing, "__dict__", {})
    return {name: plain(value) for name, value in state.items() if name not in _NO_STATE}


def plain(value: Any) -> Any:
    """A JSON value as it is, anything else as the name of its type."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        # Not its repr(), which may hold an address and so be another one in each process.
        return type(value).__qualname__


def code_of(thing: Any) -> Any:
    """A function's or a class's code, as JSON values.

    Comments, formatting and docstrings count for nothing where there is source to read.
    """
    if isinstance(thing, functools.partial):
        return [code_of(thing.func), plain(thing.args), plain(thing.keywords)]
    # The source of a lambda is its whole line, which others may share.
    if getattr(thing, "__name__", "") != "<lambda>":
        try:
            return _parsed(inspect.getsource(thing))
        except (OSError, TypeError, SyntaxError):
            pass  # No source, as for what is typed into an interpreter.
    if isinstance(thing, type):
        return {name: _member(value) for name, value in vars(thing).items() if name != "__doc__"}
    code = getattr(thing, "__code__", None)
    return _bytecode(code) if code else getattr(thing, "__qualname__", type(thing).__qualname__)


def _parsed(source: str) -> str:
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def _member(value: Any) -> Any:
    """A class's attribute: what it does if it is code, else what it is."""
    if isinstance(value, property):
        return [_member(part) for part in (value.fget, value.fset, value.fdel)]
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return _bytecode(code) if code else plain(value)


def _bytecode(code: CodeType) -> list[Any]:
    return [
        code.co_code.hex(),
        [*code.co_names, *code.co_varnames, *code.co_freevars],
        [_constant(value) for value in code.co_consts],
    ]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _bytecode(value)
    # The order of a set is another one in each process.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
