"""The student directory: its manifest, and the program that it answers for.

Owns ``student.json`` and the loading of ``program.json``, from a local folder or an fsspec
URI. The model's files are plain Hugging Face and belong to the engines.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.errors import StudentError
from serve.files import read_text
from serve.folding import Folding
from serve.programs import Setup, build_program, import_object, import_setup

if TYPE_CHECKING:
    import dspy

MANIFEST = "student.json"
PROGRAM = "program.json"


class Manifest(BaseModel):
    """What ``student.json`` says of a student."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    program: str | None
    """Import path of the factory, ``package.module:factory``; null for a student that answers
    LM calls alone."""
    setup: str | None = None
    """Import path of the program's setup hook."""
    inputs: list[str]
    outputs: list[str]
    predictors: dict[str, Any]
    """A description of each predictor's signature, by its name in the program."""
    adapter: str
    """The adapter's class, ``package.module.Class``."""
    base_model: str
    folding: dict[str, Any] | None = None
    """``Folding.to_json()``, or null for a student of full prompts."""
    grammar: dict[str, str] = {}
    """Regular expression of each predictor's folded completions; a predictor that is not
    named answers freely."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    metrics: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    versions: dict[str, str] = {}
    provenance: dict[str, Any] = {}
    """The hashes of the rows that it learned, what names its base model's files, and its whole
    recipe; empty where an earlier version made it."""
    created: str

    def save(self, student_dir: str | os.PathLike[str]) -> None:
        """Write ``student.json``; a reader never sees half of it."""
        path = Path(student_dir) / MANIFEST
        draft = path.with_suffix(".tmp")
        draft.write_text(self.model_dump_json(indent=2) + "\n", "utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, student_dir: str | os.PathLike[str]) -> "Manifest":
        """Read ``student.json``.

        Raises:
            StudentError: It is missing, or not a manifest of this version.
        """
        path = _within(student_dir, MANIFEST)
        data = _read_json(path)
        found = data.get("format_version")
        if found != 1:
            raise StudentError(
                f"{path}: format_version is {found!r}; this version of raydistill reads 1. "
                "Serve the student with the version that made it."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
            )
            raise StudentError(f"{path}: is not a student's manifest ({wrong}).") from None


@dataclass(frozen=True)
class Student:
    """What a student directory says and holds, but for the model."""

    manifest: Manifest
    program: "dspy.Module"
    adapter: "dspy.Adapter"
    setup: Setup | None = None


def load_student(student_dir: str | os.PathLike[str]) -> Student:
    """Load the program and the adapter, and see that their prompts are still the same.

    The program is not set up yet; that is for whoever runs it.

    Raises:
        StudentError: Something is missing or damaged, the student has no program, or the
            prompts are not those that it was trained on.
    """
    manifest = Manifest.load(student_dir)
    program = load_program(student_dir)
    # A program may set its adapter when it is imported or built.
    adapter = load_adapter(manifest)
    _check_folding(manifest, program, adapter)
    setup = import_setup(manifest.setup) if manifest.setup else None
    return Student(manifest, program, adapter, setup)


def load_program(student_dir: str | os.PathLike[str]) -> "dspy.Module":
    """Build the student's program and give it the state it was compiled to.

    Its predictors have no LM of their own: whoever calls it sets one in the context.

    Raises:
        StudentError: There is none, it does not import, or its predictors are not those that
            the student was made for.
    """
    manifest = Manifest.load(student_dir)
    if manifest.program is None:
        raise StudentError(
            f"{student_dir}: the student has no program that can be imported, it answers LM calls "
            "alone. Use it as dspy.LM('raydistill/<student>'), or at /v1 of raydistill serve."
        )
    program = build_program(manifest.program)
    path = _within(student_dir, PROGRAM)
    state = {name: _without_lm(value) for name, value in _read_json(path).items()}
    try:
        # The factory may hand out an object that others use as well.
        program = program.deepcopy()
        for name, predictor in program.named_predictors():
            predictor.load_state(state if predictor is program else state[name])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        names = ", ".join(name for name, _ in program.named_predictors())
        raise StudentError(
            f"{path}: does not fit {manifest.program}, whose predictors are {names} "
            f"({type(error).__name__}: {error}). The program has changed since the student "
            "was made: restore it, or make the student again."
        ) from error
    program.set_lm(None)
    return program


def load_adapter(manifest: Manifest) -> "dspy.Adapter":
    """The adapter that the student was trained with: the configured one, if it is of its class.

    Raises:
        StudentError: It does not import, or is not configured and cannot be made without
            arguments.
    """
    import dspy

    configured = dspy.settings.adapter
    if configured is not None and class_path(configured) == manifest.adapter:
        return configured
    module_name, _, class_name = manifest.adapter.rpartition(".")
    kind = import_object(f"{module_name}:{class_name}", "adapter")
    try:
        return kind()
    except TypeError as error:
        raise StudentError(
            f"adapter: {manifest.adapter} cannot be made without arguments ({error}). Let the "
            "program set it with dspy.configure(adapter=...), or give its arguments defaults."
        ) from error


def class_path(thing: object) -> str:
    """The import path of an object's class, as the manifest names the adapter's."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _check_folding(manifest: Manifest, program: "dspy.Module", adapter: "dspy.Adapter") -> None:
    if manifest.folding is None:
        return
    predictors = {name: (p.signature, p.demos) for name, p in program.named_predictors()}
    trained = Folding.from_json(manifest.folding).to_json()["predictors"]
    found = Folding.learn(predictors, adapter).to_json()["predictors"]
    changed = [name for name in {**trained, **found} if trained.get(name) != found.get(name)]
    if changed:
        raise StudentError(
            f"{manifest.program}: the prompts of {', '.join(changed)} are not those that the "
            f"student was trained on. The program, its adapter ({manifest.adapter}) or DSPy "
            f"(then {manifest.versions.get('dspy', 'unknown')}) has changed since: restore it, "
            "or train the student again."
        )


def _without_lm(state: Any) -> Any:
    """A predictor's state without the LM it was compiled with: the student takes its place."""
    return state | {"lm": None} if isinstance(state, dict) and "lm" in state else state


def _within(student_dir: str | os.PathLike[str], name: str) -> str:
    return f"{os.fspath(student_dir).rstrip('/')}/{name}"


def _read_json(path: str) -> Mapping[str, Any]:
    try:
        data = json.loads(read_text(path))
    except FileNotFoundError:
        raise StudentError(
            f"{path}: no such file; expected a student directory. Run `raydistill run` first."
        ) from None
    # Each remote filesystem raises errors of its own.
    except Exception as error:
        raise StudentError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(data, dict):
        raise StudentError(f"{path}: expected a JSON object, found {type(data).__name__}.")
    return data
