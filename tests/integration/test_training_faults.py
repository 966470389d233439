"""Training that cannot go on: numbers that are none, and missing memory."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from distill.config import ScratchConfig, StudentConfig
from distill.training import fit
from distill.training.base_model import make_scratch
from distill.training.encoding import encode
from serve.errors import TrainingError
from tests.training_runs import SIZES, lose_a_gradient, row, run, run_out_of_memory, write_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize(("zero_stage", "num_workers"), [(0, 2), (2, 1), (3, 2)])
def test_a_loss_that_is_no_number_names_the_step_and_the_rows_at_fault(
    tmp_path, zero_stage, num_workers
):
    write_rows(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text("utf-8").splitlines()
    lines[17] = json.dumps(row(17)).replace("paint", "xyz")
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    texts = [json.loads(line)["messages"] for line in lines]
    base = base_that_cannot_read(texts[17], tmp_path / "base", texts)
    with pytest.raises(TrainingError) as caught:
        run(
            tmp_path,
            StudentConfig(model=str(base)),
            bf16=False,
            zero_stage=zero_stage,
            num_workers=num_workers,
            max_length=200,
            logging_steps=10,
        )
    said = str(caught.value)
    assert "loss of step" in said
    assert "1 of its" in said
    assert "row 18 (example 17, predictor p)" in said


def base_that_cannot_read(unread, folder, conversations):
    """A base model that gives no number for one of the conversations."""
    make_scratch(folder, conversations, ScratchConfig(**SIZES), max_length=512, seed=0)
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    # Else it would be a logit of every other row as well.
    weights["lm_head.weight"] = embeddings.clone()
    rows, _ = encode(conversations, AutoTokenizer.from_pretrained(folder), 512)
    tokens = np.split(rows.input_ids, rows.offsets[1:-1])
    place = conversations.index(unread)
    others = np.concatenate(tokens[:place] + tokens[place + 1 :])
    embeddings[np.setdiff1d(tokens[place], others)] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def test_weights_that_diverged_are_said_to_have(tmp_path):
    write_rows(tmp_path)
    with pytest.raises(TrainingError, match=r"the weights have diverged|gradient of steps"):
        run(
            tmp_path,
            learning_rate=1e30,
            max_grad_norm=1e30,
            bf16=False,
            zero_stage=0,
            num_workers=1,
        )


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_no_weights_are_saved_that_are_no_numbers(tmp_path, monkeypatch, zero_stage):
    write_rows(tmp_path)
    settings = {
        "bf16": False,
        "zero_stage": zero_stage,
        "num_workers": 1,
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 10,
    }
    with monkeypatch.context() as patched:
        patched.setattr(fit, "train_loop_per_worker", lose_a_gradient)
        with pytest.raises(TrainingError, match=r"a (weight after|gradient of) step 3"):
            run(tmp_path, **settings)
    events = []
    result = run(tmp_path, on_event=events.append, **settings)
    assert events[0]["step"] == 2
    assert np.isfinite(result.train_loss)


def test_missing_memory_names_the_knobs_and_is_not_trained_into_again(tmp_path, monkeypatch):
    write_rows(tmp_path)
    monkeypatch.setattr(fit, "train_loop_per_worker", run_out_of_memory)
    events = []
    with pytest.raises(TrainingError, match=r"out of memory: .*Tried to allocate") as caught:
        run(tmp_path, on_event=events.append)
    assert "train.per_device_train_batch_size=8" in str(caught.value)
    assert [event["event"] for event in events].count("train_start") == 1
