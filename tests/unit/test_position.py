"""How far training has come: what takes it further, and how earlier versions noted it."""

from dataclasses import asdict

import pytest

from distill.training.position import Position
from serve.errors import TrainingError

EPOCH = {"epoch": 1, "train_loss": 1.0, "val_loss": 2.0, "val_exact": 0.5}


def test_a_position_is_read_as_it_was_saved():
    position = Position([{**EPOCH, "steps": 7}], [0.5], 3.0, 1.0, [{**EPOCH, "step": 7}])
    assert Position.read(asdict(position), steps_per_epoch=10) == position
    assert position.step == 8


def test_a_position_from_before_evaluations_had_one_at_each_epochs_end():
    saved = {"history": [EPOCH, {**EPOCH, "epoch": 2}], "losses": [0.5], "seconds": 3.0}
    position = Position.read(saved, steps_per_epoch=10)
    assert position.step == 21
    assert [each["step"] for each in position.evaluations] == [10, 20]


def test_a_position_with_unknown_fields_says_that_another_version_saved_it():
    with pytest.raises(TrainingError, match="another version of raydistill: it holds shards"):
        Position.read({**asdict(Position()), "shards": 3}, steps_per_epoch=10)


def test_an_evaluation_tells_the_training_loss_since_the_one_before():
    position = Position().after_steps([4.0, 2.0], 1.0).after_evaluation(3.0, 0.1, 0.5)
    position = position.after_steps([1.0], 1.0).after_evaluation(2.0, 0.2, 0.5)
    assert [each["train_loss"] for each in position.evaluations] == [3.0, 1.0]
    assert [each["step"] for each in position.evaluations] == [2, 3]


def test_an_epoch_is_summed_up_from_its_steps_and_its_last_evaluation():
    position = Position().after_steps([4.0, 2.0], 2.0).after_evaluation(3.0, 0.1, 0.5)
    position = position.after_epoch(num_tokens=100)
    assert position.history == [
        {
            "epoch": 1,
            "steps": 2,
            "train_loss": 3.0,
            "val_loss": 3.0,
            "val_exact": 0.1,
            "seconds": 2.5,
            "tokens_per_s": 50.0,
        }
    ]
    assert (position.step, position.epoch, position.losses) == (2, 2, [])
    later = position.after_steps([1.0], 1.0).after_evaluation(2.0, 0.2, 0.5)
    assert later.evaluations[-1]["train_loss"] == 1.0
