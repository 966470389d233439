"""Where a student comes from: the rows that it learned, what it started from, and how.

Pure but for the files that it reads; what becomes of it is for ``export``.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import try_to_load_from_cache

from distill.config import SCRATCH, SECRET_KEY, SECRET_URL, StudentConfig, TrainConfig
from distill.fingerprints import model_files
from distill.secrets import scrubbed

_HIDDEN = "***"


def describe(rows: Mapping[str, str], student: StudentConfig, train: TrainConfig) -> dict[str, Any]:
    """What it takes to make a student again, or to tell that another one is of the same.

    Args:
        rows: Rows files by what they were for.
        student, train: The whole recipe; what is named or looks like a secret is hidden.

    Returns:
        JSON values: ``rows`` (file by file, ``sha256`` of its bytes), ``base``, ``student`` and
        ``train``, whose ``seed`` decides whatever is drawn.
    """
    found = {
        "rows": {name: {"sha256": _sha256(path)} for name, path in rows.items()},
        "base": describe_base(student.model),
        "student": student.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
    }
    return {name: _without_secrets(value) for name, value in found.items()}


def describe_base(model: str) -> dict[str, Any]:
    """What names the very weights behind a base model's name, as far as it can be known.

    Returns:
        ``files`` of a folder on this machine (name, bytes, ns of its last change), ``revision``
        of a Hugging Face id: the commit whose files this machine has loaded. Nothing for a
        scratch student, which is made of its rows, sizes and seed, and for a remote folder.
    """
    if model == SCRATCH or "://" in model:
        return {}
    if Path(model).is_dir():
        return {"files": [list(file) for file in model_files(Path(model))]}
    config = try_to_load_from_cache(model, "config.json")
    return {"revision": Path(config).parent.name} if isinstance(config, str) else {}


def _sha256(path: str) -> str:
    with fsspec.open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
        return digest.hexdigest()


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _HIDDEN if SECRET_KEY.search(str(key)) else _without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return SECRET_URL.sub(f"://{_HIDDEN}@", scrubbed(value))
