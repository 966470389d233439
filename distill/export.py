"""Puts a student directory together: the trained model, the program, the manifest.

What the directory means, and how it is read, is ``serve.student``.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dspy
import pydantic
from dspy.utils.saving import get_dependency_versions

from distill import summary
from distill.config import ServeConfig
from distill.rows import Prompts
from distill.rundir import RunDir
from serve.errors import ConfigurationError
from serve.files import local_folder
from serve.folding import Folding
from serve.patterns import completion_pattern
from serve.programs import describe_signature
from serve.student import MANIFEST, PROGRAM, Manifest, class_path

if TYPE_CHECKING:
    from distill.training.job import TrainingResult
    from serve.app import AppArgs

logger = logging.getLogger(__name__)

STUDENT = "student"
TRAINING = "training.json"
"""How the student's training went, in its directory."""


def student_identity(directory: RunDir, folder: str = STUDENT) -> str | None:
    """What names the student: the fingerprint of its rows, base model and recipe."""
    manifest = directory.read_json(f"{folder}/{MANIFEST}")
    return manifest["fingerprints"]["student"] if manifest else None


@dataclass(frozen=True)
class Profile:
    """What a student's directory says besides its model: whose calls it answers, and how.

    Attributes:
        state: The program's, as ``program_state`` gives it; None for a student of LM calls alone.
        program_path: Import path of its factory; None if it has none, as in a notebook.
        setup: Import path of its setup hook; None if it has none.
        fingerprint: Changes with the program; see ``program_fingerprint``.
        inputs, outputs: The program's.
        predictors: Descriptions of the signatures of the predictors that the student answers.
        adapter: The class path of the adapter that rendered the rows.
        folding: None for full prompts.
        grammar: Regular expression of each predictor's folded completions.
    """

    state: Mapping[str, Any] | None = None
    program_path: str | None = None
    setup: str | None = None
    fingerprint: str | None = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    predictors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: str = class_path(dspy.ChatAdapter())
    folding: Folding | None = None
    grammar: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields that a manifest takes over."""
        about = {
            "program": self.program_path,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "predictors": dict(self.predictors),
            "adapter": self.adapter,
            "folding": self.folding.to_json() if self.folding else None,
            "grammar": dict(self.grammar),
        }
        # Not where there is none, so that a student without a hook is named as ever.
        return {**about, "setup": self.setup} if self.setup else about


def program_state(program: dspy.Module, exclude_demos: bool = False) -> dict[str, Any] | None:
    """A program's state in DSPy's own format, without its LMs: the student takes their place.

    Returns:
        None where the state has no JSON form.
    """
    # Not the program's own, which fails on a dspy.Retrieve: no predictor, but a parameter.
    states = {name: predictor.dump_state() for name, predictor in program.named_predictors()}
    for predictor in states.values():
        predictor["lm"] = None
        predictor["demos"] = [] if exclude_demos else predictor["demos"]
    state: dict[str, Any] = states["self"] if isinstance(program, dspy.Predict) else states
    state["metadata"] = {"dependency_versions": get_dependency_versions()}
    try:
        json.dumps(state)
    except TypeError as error:
        logger.warning("The student cannot be served as the program: its state %s.", error)
        return None
    return state


def make_profile(
    prompts: Prompts, adapter: dspy.Adapter, folding: Folding | None, **about: Any
) -> Profile:
    """The profile of a student that answers these predictors.

    Args:
        prompts: The predictors, as they will ask the student.
        adapter: Renders their prompts.
        folding: None for full prompts.
        about: Further fields of the profile.
    """
    return Profile(
        predictors={
            name: describe_signature(signature) for name, (signature, _) in prompts.items()
        },
        adapter=class_path(adapter),
        folding=folding,
        grammar={
            name: completion_pattern(signature, adapter, folding, name)
            for name, (signature, _) in prompts.items()
            if folding and name in folding.completions
        },
        **about,
    )


def write_student(
    directory: RunDir,
    folder: str,
    profile: Profile,
    base_model: str,
    result: "TrainingResult",
    identity: str,
    provenance: Mapping[str, Any],
    packages: Sequence[str] = (),
) -> None:
    """Write a student directory; it takes the place of an older one only when it is whole.

    Args:
        directory: The run directory.
        folder: The student's name in it.
        profile: What the student answers.
        base_model: What it was trained from.
        result: ``result.model_dir`` is copied.
        identity: What names the student.
        provenance: See ``provenance``.
        packages: What it was made with besides the packages that make every student.
    """
    metrics = {name: getattr(result, name) for name in ("train_loss", "val_loss", "val_exact")}
    dev_score = result.candidates[0].metric if result.candidates else None
    if dev_score is not None:
        metrics["dev_score"] = dev_score
    manifest = Manifest(
        **profile.to_json(),
        base_model=base_model,
        max_new_tokens=result.max_new_tokens,
        metrics=metrics,
        fingerprints={"student": identity},
        versions=summary.versions(*packages),
        provenance=dict(provenance),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with (
        directory.replacing(folder, seal=MANIFEST) as new,
        local_folder(result.model_dir) as model,
    ):
        shutil.copytree(model, new, dirs_exist_ok=True)
        (new / TRAINING).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
        if profile.state is not None:
            (new / PROGRAM).write_text(json.dumps(profile.state, indent=2) + "\n")
        manifest.save(new)


def add_scores(directory: RunDir, report: Mapping[str, Any]) -> None:
    """Note in the manifest how the student and its teacher did."""
    manifest = directory.read_json(f"{STUDENT}/{MANIFEST}")
    scores = {
        f"{arm}_score": section["score"] for arm, section in report["arms"].items() if section
    }
    manifest["metrics"].update(scores)
    directory.write_json(f"{STUDENT}/{MANIFEST}", manifest)


def app_args(directory: RunDir) -> "AppArgs":
    """How to serve a run's student, as its configuration says, or a student on its own.

    Args:
        directory: A run directory, or a student directory.

    Raises:
        ConfigurationError: It is neither, or the run holds no student.
    """
    from serve.app import AppArgs

    if directory.exists(MANIFEST):
        return AppArgs(student=directory.uri)
    config = _serve_config(directory)
    if student_identity(directory) is None:
        raise ConfigurationError(
            f"{directory.uri}: holds no student. Train one with raydistill run CONFIG."
        )
    return AppArgs(
        student=directory.join(STUDENT),
        min_replicas=config.replicas.min,
        max_replicas=config.replicas.max,
        api_key_env=config.api_key_env,
    )


def _serve_config(directory: RunDir) -> ServeConfig:
    expected = "Give the folder that raydistill run made, <storage>/<name>, or a student's."
    try:
        config = directory.read_json("config.json")
    except ValueError as error:
        raise ConfigurationError(
            f"{directory.join('config.json')}: is not JSON ({error}). {expected}"
        ) from None
    if config is None:
        raise ConfigurationError(
            f"{directory.uri}: is no run directory, since it has no config.json. {expected}"
        )
    found = config.get("serve") if isinstance(config, dict) else None
    if found is None:
        raise ConfigurationError(
            f"{directory.join('config.json')}: has no section serve, so it is not a run's "
            f"configuration. {expected}"
        )
    try:
        return ServeConfig.model_validate(found)
    except pydantic.ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, ('serve', *item['loc'])))}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigurationError(
            f"{directory.join('config.json')}: {wrong}. Correct it, or run raydistill run again."
        ) from None
