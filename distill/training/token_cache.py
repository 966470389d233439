"""Tokenised rows are kept in the run's training folder: a run that goes on makes them once.

One file holds them all, with what they were made from. Tokenising is for ``encoding``.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from distill.config import LongRows
from distill.fingerprints import fingerprint
from distill.rundir import RunDir
from distill.training.batches import EncodedRows
from distill.training.encoding import Conversation, LongCounts, encode
from serve.files import local_folder

logger = logging.getLogger(__name__)

_FOLDER, _FILE = "tokens", "tokens.npz"
_KEY = "key"
_FORMAT = 1
"""Another one whenever the same rows would become other tokens, or other arrays."""

Encoded = tuple[EncodedRows, LongCounts]


def encode_once(
    run: RunDir,
    splits: Mapping[str, Sequence[Conversation]],
    tokenizer: Any,
    max_length: int,
    long_rows: LongRows,
) -> dict[str, Encoded]:
    """Rows as ``encode`` gives them, from the run's folder where they are there.

    Args:
        run: The training's folder; the rows are left in it.
        splits: Conversations by name.
        tokenizer, max_length, long_rows: As for ``encode``.
    """
    key = _key(splits, tokenizer, max_length, long_rows)
    kept = _read(run, key, splits)
    if kept is not None:
        return kept
    made = {
        name: encode(conversations, tokenizer, max_length, long_rows, f"{name} row")
        for name, conversations in splits.items()
    }
    with run.guarded(), run.replacing(_FOLDER, seal=_FILE) as folder:
        np.savez(folder / _FILE, **_arrays(made, key))
    return made


def _key(
    splits: Mapping[str, Sequence[Conversation]],
    tokenizer: Any,
    max_length: int,
    long_rows: LongRows,
) -> str:
    return fingerprint(
        {
            "format": _FORMAT,
            "rows": {name: _hash(map(json.dumps, rows)) for name, rows in splits.items()},
            "tokenizer": _hash([tokenizer.backend_tokenizer.to_str()]),
            "tokens": tokenizer.special_tokens_map,
            "template": tokenizer.chat_template,
            "max_length": max_length,
            "long_rows": long_rows,
            "versions": [transformers.__version__, tokenizers.__version__],
        }
    )


def _hash(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{text}\n".encode())
    return found.hexdigest()


def _read(run: RunDir, key: str, names: Iterable[str]) -> dict[str, Encoded] | None:
    if not run.exists(f"{_FOLDER}/{_FILE}"):
        return None
    try:
        with local_folder(run.join(_FOLDER)) as folder:
            return _load(folder / _FILE, key, names)
    # What a damaged archive raises depends on where it is damaged.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        where = run.join(f"{_FOLDER}/{_FILE}")
        logger.warning("%s is damaged and made again (%s).", where, error)
        return None


def _load(file: Path, key: str, names: Iterable[str]) -> dict[str, Encoded] | None:
    with np.load(file, allow_pickle=False) as arrays:
        if str(arrays[_KEY]) != key:
            return None
        return {
            name: (
                EncodedRows(
                    input_ids=arrays[f"{name}.input_ids"],
                    completion=arrays[f"{name}.completion"],
                    offsets=arrays[f"{name}.offsets"],
                    sources=arrays[f"{name}.sources"],
                ),
                LongCounts(*map(int, arrays[f"{name}.long"])),
            )
            for name in names
        }


def _arrays(made: Mapping[str, Encoded], key: str) -> dict[str, Any]:
    arrays: dict[str, Any] = {_KEY: np.array(key)}
    for name, (rows, long) in made.items():
        arrays[f"{name}.input_ids"] = rows.input_ids
        arrays[f"{name}.completion"] = rows.completion
        arrays[f"{name}.offsets"] = rows.offsets
        arrays[f"{name}.sources"] = rows.sources
        arrays[f"{name}.long"] = np.array([long.dropped, long.cut])
    return arrays
