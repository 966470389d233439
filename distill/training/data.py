"""What a training learns from: rows files, read, tokenised and packed once, on the driver.

Owns the base model of a scratch student as well, which is made from the same rows. What a row
becomes is for ``encoding`` and ``packing``, that it is kept for ``token_cache``.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import fsspec

from distill.config import SCRATCH, StudentConfig, TrainConfig
from distill.rundir import RunDir
from distill.training.base_model import (
    load_tokenizer,
    local_base,
    make_scratch,
    max_positions,
)
from distill.training.batches import EncodedRows
from distill.training.encoding import Conversation, LongCounts
from distill.training.packing import pack
from distill.training.token_cache import encode_once
from serve.errors import TrainingError

logger = logging.getLogger(__name__)

_BASE = "base"
_SEAL = "config.json"
_NAMED = 5


@dataclass(frozen=True)
class Data:
    """What the workers learn from.

    Attributes:
        train: Rows that are learned.
        val: Rows that the epochs are compared by; may be none.
        long: What became of rows of either that are too long.
        base: Hugging Face directory or id that training starts from.
    """

    train: EncodedRows
    val: EncodedRows
    long: LongCounts
    base: str


def prepare(
    train_rows: str, val_rows: str, student: StudentConfig, train: TrainConfig, run: RunDir
) -> Data:
    """Read the rows and make of them what the workers are given.

    Args:
        train_rows, val_rows: Rows files; the second may be empty.
        student: What is trained.
        train: How.
        run: The training's folder; what is made is left in it.

    Raises:
        ConfigurationError: The student model cannot be used.
        TrainingError: There is nothing to train on.
    """
    run.create()
    conversations, held_out = _read_rows(train_rows), _read_rows(val_rows)
    base = student.model
    if base == SCRATCH:
        base = _make_base(conversations, student, train, run)
    with local_base(base) as source:
        tokenizer = load_tokenizer(source)
        longest = min(train.max_length, max_positions(source) or train.max_length)
    splits = {"train": conversations, "val": held_out}
    encoded = encode_once(run, splits, tokenizer, longest, train.long_rows)
    (rows, long), (val, val_long) = encoded["train"], encoded["val"]
    if not len(rows):
        raise TrainingError(
            f"{train_rows}: {len(conversations)} rows, none of at most {longest} tokens. "
            "Raise train.max_length, use student.prompt=folded, or keep more traces."
        )
    long += val_long
    if long.dropped or long.cut:
        logger.warning("%d rows are longer than %d tokens.", long.dropped + long.cut, longest)
    if train.packing:
        rows = pack(rows, longest, train.seed)
    return Data(train=rows, val=val, long=long, base=base)


def name_rows(path: str, rows: Sequence[int]) -> str:
    """A few of the rows of a file, by what they were made of."""
    with fsspec.open(path, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    names = []
    for row in rows[:_NAMED]:
        found = json.loads(lines[row])
        about = [
            f"{what} {found[key]}"
            for what, key in (("example", "example_id"), ("predictor", "predictor"))
            if key in found
        ]
        names.append(f"row {row + 1}" + (f" ({', '.join(about)})" if about else ""))
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{', '.join(names)}{more} of {path}"


def _read_rows(path: str) -> list[Conversation]:
    """The conversations of a rows file.

    Raises:
        TrainingError: The file is not there, or is not a rows file.
    """
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["messages"] for line in lines if line.strip()]
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such rows file.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{path}: is not a rows file ({error!r}); expected JSON lines with messages."
        ) from error


def _make_base(
    conversations: Sequence[Conversation], student: StudentConfig, train: TrainConfig, run: RunDir
) -> str:
    if not run.exists(f"{_BASE}/{_SEAL}"):
        with run.replacing(_BASE, seal=_SEAL) as folder:
            make_scratch(
                folder,
                conversations,
                student.scratch,
                max_length=train.max_length,
                seed=train.seed,
                long_rows=train.long_rows,
            )
    return run.join(_BASE)
