"""Rows that share sequences train the student that they train on their own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training_runs import row, run, write_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

# All rows make one step. With a large epsilon, Adam's step is as long as the gradient, so
# that a wrong scale of the gradient shows.
ONE_STEP = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 25,
    "bf16": False,
    "learning_rate": 0.5,
    "deepspeed": {"optimizer": {"params": {"eps": 1.0}}},
}


def weights_of(result):
    return AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32).state_dict()


def test_packed_rows_make_the_same_student_in_as_many_steps_as_told(tmp_path):
    write_rows(tmp_path, num_rows=49)
    events = []
    alone = run(tmp_path, name="alone", **ONE_STEP)
    packed = run(
        tmp_path, name="packed", packing=True, max_length=64, on_event=events.append, **ONE_STEP
    )
    assert (alone.steps, packed.steps) == (2, 2)
    assert events[-1]["step"] == events[-1]["num_steps"] == 2
    assert (packed.rows, packed.tokens) == (alone.rows, alone.tokens)
    assert packed.max_new_tokens == alone.max_new_tokens
    assert packed.val_loss == pytest.approx(alone.val_loss, rel=1e-3)
    assert packed.train_loss == pytest.approx(alone.train_loss, rel=1e-3)
    found, untrained = (
        weights_of(packed),
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "checkpoints" / "alone" / "base"
        ).state_dict(),
    )
    for name, weight in weights_of(alone).items():
        assert not torch.equal(weight, untrained[name]), name
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


def test_fewer_sequences_than_ranks_end_in_order(tmp_path):
    write_rows(tmp_path, num_rows=2, num_val_rows=1)
    result = run(
        tmp_path,
        packing=True,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        max_length=128,
        zero_stage=3,
    )
    assert (result.rows, result.steps) == (2, 1)


def test_conversations_are_trained_on_cut_and_not_tokenised_again(tmp_path):
    write_rows(tmp_path, num_rows=8, num_val_rows=0)
    talk = [message for number in range(4) for message in row(number)["messages"]]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"messages": talk}) + "\n")
    settings = {"num_train_epochs": 1, "num_workers": 1, "max_length": 40}
    result = run(tmp_path, long_rows="keep_end", **settings)
    assert (result.rows, result.cut_rows, result.dropped_rows) == (9, 1, 0)
    # The longest answer of a single turn, not of all.
    assert result.max_new_tokens < 40
    tokens = tmp_path / "checkpoints" / "run" / "tokens" / "tokens.npz"
    made = tokens.stat().st_mtime_ns
    assert run(tmp_path, long_rows="keep_end", **settings) == result
    assert tokens.stat().st_mtime_ns == made
