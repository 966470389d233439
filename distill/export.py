"""Puts a student directory together: the trained model, the program, the manifest.

What the directory means, and how it is read, is ``serve.student``.
"""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pydantic

from distill import summary
from distill.config import RunConfig, ServeConfig
from distill.preflight import Inputs
from distill.programs import fingerprint
from distill.rundir import RunDir
from serve.errors import ConfigurationError
from serve.files import local_folder
from serve.patterns import completion_pattern
from serve.programs import describe_signature
from serve.student import MANIFEST, PROGRAM, Manifest, class_path

if TYPE_CHECKING:
    from distill.training.job import TrainingResult
    from serve.app import AppArgs

STUDENT = "student"


def is_current(directory: RunDir, identity: str) -> bool:
    """Whether the run directory holds the student of this identity."""
    return student_identity(directory) == identity


def student_identity(directory: RunDir) -> str | None:
    """What names the student: the fingerprint of its rows, base model and recipe."""
    manifest = directory.read_json(f"{STUDENT}/{MANIFEST}")
    return manifest["fingerprints"]["student"] if manifest else None


def write_student(
    directory: RunDir,
    config: RunConfig,
    inputs: Inputs,
    outputs: Sequence[str],
    result: "TrainingResult",
    identity: str,
) -> None:
    """Write ``student/``; it takes the place of an older one only when it is whole.

    Args:
        directory: The run directory.
        config: The run's configuration.
        inputs: The program, and the folding that the rows were folded with.
        outputs: The names of the program's outputs.
        result: ``result.model_dir`` is copied.
        identity: What names the student.
    """
    program = inputs.task.program
    manifest = Manifest(
        program=config.program,
        inputs=list(config.data.inputs),
        outputs=list(outputs),
        predictors={
            name: describe_signature(predictor.signature)
            for name, predictor in program.named_predictors()
        },
        adapter=class_path(inputs.task.adapter),
        base_model=config.student.model,
        folding=inputs.folding.to_json() if inputs.folding else None,
        grammar=_grammar(inputs),
        max_new_tokens=result.max_new_tokens,
        metrics={
            "train_loss": result.train_loss,
            "val_loss": result.val_loss,
            "val_exact": result.val_exact,
        },
        fingerprints={"student": identity, "config": fingerprint(config.model_dump(mode="json"))},
        versions=summary.versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with (
        directory.replacing(STUDENT, seal=MANIFEST) as folder,
        local_folder(result.model_dir) as model,
    ):
        shutil.copytree(model, folder, dirs_exist_ok=True)
        program.save(str(folder / PROGRAM))
        manifest.save(folder)


def add_scores(directory: RunDir, report: Mapping[str, Any]) -> None:
    """Note in the manifest how the student and its teacher did."""
    manifest = directory.read_json(f"{STUDENT}/{MANIFEST}")
    scores = {
        f"{arm}_score": section["score"] for arm, section in report["arms"].items() if section
    }
    manifest["metrics"].update(scores)
    directory.write_json(f"{STUDENT}/{MANIFEST}", manifest)


def app_args(directory: RunDir) -> "AppArgs":
    """How to serve the run's student, as its configuration says.

    Raises:
        ConfigurationError: This is no run directory, or it holds no student.
    """
    from serve.app import AppArgs

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
    expected = "Give the folder that raydistill run made, <storage>/<name>."
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


def _grammar(inputs: Inputs) -> dict[str, str]:
    if inputs.folding is None:
        return {}
    return {
        name: completion_pattern(predictor.signature, inputs.task.adapter, inputs.folding, name)
        for name, predictor in inputs.task.program.named_predictors()
        if name in inputs.folding.completions
    }
