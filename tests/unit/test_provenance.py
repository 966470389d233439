"""What a student's directory says of where the student comes from."""

import hashlib
import json

import huggingface_hub.constants
import pytest

from distill.config import StudentConfig, TrainConfig
from distill.provenance import describe, describe_base


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    return {"train": str(tmp_path / "train.jsonl")}


def test_rows_are_named_by_the_hash_of_their_file(rows):
    found = describe(rows, StudentConfig(), TrainConfig())["rows"]
    expected = hashlib.sha256(b'{"messages": []}\n').hexdigest()
    assert found == {"train": {"sha256": expected}}


def test_the_recipe_is_whole_and_makes_the_same_configuration_again(rows):
    student = StudentConfig(model="some/model", lora={"r": 4})
    train = TrainConfig(seed=7, deepspeed={"optimizer": {"params": {"eps": 1.0}}})
    found = json.loads(json.dumps(describe(rows, student, train)))
    assert StudentConfig.model_validate(found["student"]) == student
    assert TrainConfig.model_validate(found["train"]) == train


def test_secrets_are_no_part_of_the_recipe(rows, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    train = TrainConfig(
        deepspeed={
            "comet": {"api_key": "abc", "project": "of sk-0123456789"},
            "urls": ["s3://me:mine@bucket"],
        }
    )
    found = describe(rows, StudentConfig(), train)["train"]["deepspeed"]
    assert found == {"comet": {"api_key": "***", "project": "of ***"}, "urls": ["s3://***@bucket"]}


def test_a_base_model_is_named_by_its_files_or_its_revision(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("of no matter")
    (name, size, _), *others = describe_base(str(tmp_path))["files"]
    assert (name, size, others) == ("config.json", 2, [])

    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / ("0f" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0f" * 20)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert describe_base("some/model") == {"revision": "0f" * 20}
    assert describe_base("another/model") == {}
    assert describe_base("scratch") == describe_base("s3://bucket/model") == {}
