"""The student directory: its manifest, and the program that it answers for.

Owns ``student.json`` and the loading of ``program.json``. The model's files are plain
Hugging Face and belong to the engines.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.errors import StudentError
from serve.programs import build_program, import_object

if TYPE_CHECKING:
    import dspy

MANIFEST = "student.json"
PROGRAM = "program.json"


class Manifest(BaseModel):
    """What ``student.json`` says of a student."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    program: str
    """Import path of the factory, ``package.module:factory``."""
    inputs: list[str]
    outputs: list[str]
    predictors: dict[str, Any]
    """A description of each predictor's signature, by its name in the program."""
    adapter: str
    """The adapter's class, ``package.module.Class``."""
    base_model: str
    folding: dict[str, Any] | None = None
    """``Folding.to_json()``, or null for a student of full prompts."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    metrics: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    versions: dict[str, str] = {}
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
        path = Path(student_dir) / MANIFEST
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


def load_program(student_dir: str | os.PathLike[str]) -> "dspy.Module":
    """Build the student's program and give it the state it was compiled to.

    Its predictors have no LM of their own: whoever calls it sets one in the context.

    Raises:
        StudentError: The program does not import, or its predictors are not those that
            the student was made for.
    """

    manifest = Manifest.load(student_dir)
    program = build_program(manifest.program)
    path = Path(student_dir) / PROGRAM
    state = {name: _without_lm(value) for name, value in _read_json(path).items()}
    try:
        # The factory may hand out an object that others use as well.
        program = program.deepcopy()
        program.load_state(state)
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
    """The adapter that the student was trained with.

    Raises:
        StudentError: It does not import, or cannot be made without arguments.
    """
    module_name, _, class_name = manifest.adapter.rpartition(".")
    kind = import_object(f"{module_name}:{class_name}", "adapter")
    try:
        return kind()
    except TypeError as error:
        raise StudentError(
            f"adapter: {manifest.adapter} cannot be made without arguments ({error}). Give its "
            "arguments defaults."
        ) from error


def _without_lm(state: Any) -> Any:
    """A predictor's state without the LM it was compiled with: the student takes its place."""
    return state | {"lm": None} if isinstance(state, dict) and "lm" in state else state


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise StudentError(
            f"{path}: no such file; expected a student directory. Run `raydistill run` first."
        ) from None
    except (OSError, ValueError) as error:
        raise StudentError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(data, dict):
        raise StudentError(f"{path}: expected a JSON object, found {type(data).__name__}.")
    return data
