"""Where training goes on from: positions as this version and earlier ones saved them."""

from dataclasses import asdict

import pytest

from distill.training.checkpoints import Position
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
