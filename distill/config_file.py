"""Reads a configuration: one YAML file with overrides, validated whole before anything runs.

Owns the overrides of the command line, what paths are relative to, and the messages for a
wrong key or value, which name every mistake at once. The keys are in ``config``.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from distill.config import OPEN_MODEL, SCRATCH, RunConfig, Section
from serve.errors import ConfigurationError


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a configuration file.

    Args:
        path: The YAML file. Relative paths inside it are relative to its folder.
        overrides: ``key.path=value`` strings; the value is read as YAML. Paths given
            here are relative to the working directory, as a shell user expects.

    Raises:
        ConfigurationError: The file cannot be read, or what it says is not valid; the
            message names each wrong key with the nearest known one, or the expected value.
    """
    source = Path(path)
    tree = _read_yaml(source)
    for override in overrides:
        _apply_override(tree, override)
    _resolve_paths(tree, source.parent.resolve(), {o.split("=", 1)[0] for o in overrides})
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError(f"{source}: {explain(error, RunConfig)}") from None


def explain(
    error: ValidationError,
    section: type[Section],
    name_key: Callable[[Sequence[str]], str] = ".".join,
) -> str:
    """What is wrong with a section's keys and values, in a line for each.

    Args:
        error: What validation found.
        section: What was validated.
        name_key: How a key is written, given it and the keys it is inside of.
    """
    lines = (_explain(item, section, name_key) for item in error.errors())
    return "\n".join(dict.fromkeys(lines))


def validated(kind: type[Section], given: Mapping[str, Any], name: str) -> Any:
    """The section of these settings; its errors call them ``name``."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigurationError(f"{name}: {explain(error, kind)}") from None


def _read_yaml(source: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(source.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{source}: no such configuration file.") from None
    except OSError as error:
        raise ConfigurationError(f"{source}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{source}: is not a text file; expected YAML.") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigurationError(f"{source}: is not valid YAML: {where}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigurationError(f"{source}: expected keys such as name: and data:, found {found}.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigurationError(
            f"{override!r} is not an override; expected key.path=value, as train.num_workers=1."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"{override!r}: the value is not valid YAML.") from None
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigurationError(f"{override!r}: {key} holds a value, not further keys.")
        node = child
    node[keys[-1]] = value


def _resolve_paths(tree: dict[str, Any], folder: Path, overridden: set[str]) -> None:
    def base(path: str) -> Path:
        given = any(path == key or path.startswith(f"{key}.") for key in overridden)
        return Path.cwd() if given else folder

    def located(value: Any, path: str) -> Any:
        if isinstance(value, str) and not _is_uri(value):
            return os.path.normpath(base(path) / value)
        return value

    def resolve(section: Any, key: str, path: str) -> None:
        if isinstance(section, dict) and key in section:
            section[key] = located(section[key], path)

    tree.setdefault("storage", "runs")
    resolve(tree, "storage", "storage")
    for key in ("train", "dev", "test"):
        resolve(tree.get("data"), key, f"data.{key}")
    trace = tree.get("trace")
    if isinstance(trace, dict) and isinstance(imports := trace.get("import"), list):
        trace["import"] = [located(value, "trace.import") for value in imports]
    student = tree.get("student")
    if isinstance(student, dict) and isinstance(model := student.get("model"), str):
        student["model"] = _located_model(model, base("student.model"))
    teacher = tree.get("teacher")
    lm = teacher.get("lm") if isinstance(teacher, dict) else None
    if isinstance(lm, dict) and isinstance(model := lm.get("model"), str):
        prefix, found, name = model.partition(OPEN_MODEL)
        if found and not prefix:
            lm["model"] = OPEN_MODEL + _located_model(name, base("teacher.lm.model"))


def _located_model(model: str, base: Path) -> str:
    path = base / Path(model).expanduser()
    # A Hugging Face id looks like a relative path; a directory that is there wins.
    is_there = model not in ("", SCRATCH) and path.is_dir()
    return str(path) if model.startswith((".", "/", "~")) or is_there else model


def _is_uri(value: str) -> bool:
    return bool(re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", value))


def _explain(error: Any, section: type[Section], name_key: Callable[[Sequence[str]], str]) -> str:
    keys = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        keys = [*(key for key in keys[:-1] if not _is_union_branch(key)), keys[-1]]
        known = _known_keys(section, keys[:-1])
        return f"{name_key(keys)}: unknown key; {_suggest(keys[-1], known)}"
    keys = [key for key in keys if not _is_union_branch(key)]
    name = name_key(keys) if keys else ""
    if error["type"] == "missing":
        return f"{name}: is missing; it is required."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        message = (
            "expected an import path, package.module:name"
            if keys[-1] in ("program", "metric")
            else "expected letters, digits, '.', '_' and '-'"
        )
    found = "" if error["type"] == "value_error" else f", found {error['input']!r}"
    return f"{name}: {message}{found}." if name else f"{message}."


def _suggest(key: str, known: Sequence[str]) -> str:
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.7):
        return f"did you mean {near[0]}?"

    # An abbreviation is far from every key, but farthest from those that are not meant.
    initials = [name for name in known if key == "".join(part[:1] for part in name.split("_"))]
    far = initials or difflib.get_close_matches(key, known, n=1, cutoff=0.25)
    guess = f"did you mean {far[0]}? " if far else ""
    return f"{guess}Known keys: {', '.join(known)}."


def _is_union_branch(key: str) -> bool:
    # pydantic names the branch of a union it tried as if it were a key.
    return key in ("bool", "int", "float", "str", "range") or "[" in key


def _known_keys(section: type[Section], keys: Sequence[str]) -> list[str]:
    model: Any = section
    for key in keys:
        annotation = model.model_fields[key].annotation
        # One of a union is the section; the others are plain values.
        kinds = (getattr(kind, "__origin__", kind) for kind in get_args(annotation))
        model = next((kind for kind in kinds if _is_section(kind)), annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
