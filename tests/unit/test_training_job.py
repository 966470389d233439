"""What a training job makes before its workers start."""

import json

import pytest
from tokenizers import Tokenizer

from distill.config import ScratchConfig, StudentConfig
from distill.training import job
from distill.training.base_model import make_scratch
from tests.training_runs import SIZES, row, run, write_rows

WORDS = ("zyzzyva", "quagga")
# Room for every word of a few rows.
STUDENT = StudentConfig(scratch={**SIZES, "vocab_size": 600})


class Prepared(Exception):
    """In the place of the workers' training."""


def append(path, numbers):
    """Add rows that are full of words that the others lack."""
    with path.open("a") as file:
        for number in numbers:
            found = row(number)
            for message, word in zip(found["messages"], WORDS, strict=True):
                message["content"] += f" {word}" * 20
            file.write(json.dumps(found) + "\n")


def learned_tokens(folder, monkeypatch):
    def stop(*_, **__):
        raise Prepared

    monkeypatch.setattr(job, "fit", stop)
    with pytest.raises(Prepared):
        run(folder, STUDENT)
    return folder / "checkpoints" / "run" / "base" / "tokenizer.json"


def test_a_scratch_students_tokens_are_those_of_the_rows_that_it_learns_alone(
    tmp_path, monkeypatch
):
    write_rows(tmp_path)
    append(tmp_path / "val.jsonl", range(60, 70))
    found = learned_tokens(tmp_path, monkeypatch)
    rows = [row(number)["messages"] for number in range(50)]
    sizes = ScratchConfig(**STUDENT.scratch.model_dump())
    make_scratch(tmp_path / "alone", rows, sizes, max_length=4096, seed=0)
    assert found.read_bytes() == (tmp_path / "alone" / "tokenizer.json").read_bytes()
    assert not {f"Ġ{word}" for word in WORDS} & Tokenizer.from_file(str(found)).get_vocab().keys()


def test_words_of_the_rows_that_it_learns_become_tokens(tmp_path, monkeypatch):
    write_rows(tmp_path)
    append(tmp_path / "train.jsonl", range(60, 70))
    found = learned_tokens(tmp_path, monkeypatch)
    assert {f"Ġ{word}" for word in WORDS} <= Tokenizer.from_file(str(found)).get_vocab().keys()
