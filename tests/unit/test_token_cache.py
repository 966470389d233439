"""Tokenised rows are made once, and again whenever they would be others."""

import logging

import pytest

from distill.config import ScratchConfig
from distill.rundir import RunDir
from distill.training.base_model import load_tokenizer, make_scratch
from distill.training.encoding import LongCounts, encode
from distill.training.token_cache import encode_once
from tests.training_runs import SIZES, row

ROWS = {
    "train": [row(number)["messages"] for number in range(20)],
    "val": [row(number)["messages"] for number in range(20, 24)],
}


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.texts = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **options):
        self.texts += len(texts) if isinstance(texts, list) else 0
        return self._tokenizer(texts, **options)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    make_scratch(folder, ROWS["train"], ScratchConfig(**SIZES), max_length=64, seed=0)
    return load_tokenizer(str(folder))


@pytest.fixture
def tokenizer(loaded):
    return Counting(loaded)


@pytest.fixture(params=["local", "remote"])
def run_dir(request, tmp_path):
    uri = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"
    directory = RunDir(uri)
    directory.create()
    return directory


def same(found, expected):
    return (
        found[1] == expected[1]
        and found[0].input_ids.tolist() == expected[0].input_ids.tolist()
        and found[0].completion.tolist() == expected[0].completion.tolist()
        and found[0].offsets.tolist() == expected[0].offsets.tolist()
    )


def test_rows_are_tokenised_once(run_dir, tokenizer, loaded):
    first = encode_once(run_dir, ROWS, tokenizer, 14, "keep_start")
    assert tokenizer.texts == 24
    second = encode_once(run_dir, ROWS, tokenizer, 14, "keep_start")
    assert tokenizer.texts == 24
    for name, conversations in ROWS.items():
        expected = encode(conversations, loaded, 14, "keep_start")
        assert same(first[name], expected)
        assert same(second[name], expected)
    assert second["train"][1] != LongCounts()


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": {**ROWS, "train": ROWS["train"][::-1]}},
        {"max_length": 12},
        {"long_rows": "keep_end"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_rows_or_settings_are_tokenised_anew(tmp_path, tokenizer, loaded, changes):
    directory = RunDir(str(tmp_path))
    settings = {"splits": ROWS, "max_length": 14, "long_rows": "drop"}
    encode_once(directory, tokenizer=tokenizer, **settings)
    found = encode_once(directory, tokenizer=tokenizer, **settings | changes)
    assert tokenizer.texts == 48
    wanted = settings | changes
    train = wanted["splits"]["train"]
    expected = encode(train, loaded, wanted["max_length"], wanted["long_rows"])
    assert same(found["train"], expected)


def test_another_template_is_another_tokenizer(tmp_path, tokenizer, loaded):
    directory = RunDir(str(tmp_path))
    encode_once(directory, ROWS, tokenizer, 14, "drop")
    before = loaded.chat_template
    try:
        loaded.chat_template = before.replace("<|assistant|>", "<|system|>")
        encode_once(directory, ROWS, tokenizer, 14, "drop")
    finally:
        loaded.chat_template = before
    assert tokenizer.texts == 48


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_damaged_tokens_are_made_again_and_said(tmp_path, tokenizer, damage, caplog):
    directory = RunDir(str(tmp_path))
    expected = encode_once(directory, ROWS, tokenizer, 14, "drop")
    file = tmp_path / "tokens" / "tokens.npz"
    whole = file.read_bytes()
    place = whole.index(expected["train"][0].input_ids.tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    file.write_bytes({"cut": whole[:-30], "flipped": flipped, "emptied": b""}[damage])
    with caplog.at_level(logging.WARNING):
        found = encode_once(directory, ROWS, tokenizer, 14, "drop")
    assert "is damaged and made again" in caplog.text
    assert tokenizer.texts == 48
    assert same(found["train"], expected["train"])
    encode_once(directory, ROWS, tokenizer, 14, "drop")
    assert tokenizer.texts == 48
