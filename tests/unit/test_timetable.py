"""When training pauses, evaluates, saves and ends."""

import pytest

from distill.config import TrainConfig
from distill.training.position import Position
from distill.training.timetable import Timetable


def make(steps_per_epoch=10, validates=True, **settings):
    train = TrainConfig(num_train_epochs=3, **settings)
    return Timetable(train, steps_per_epoch, validates)


def finish_epoch(position, timetable, val_exact=0.5):
    rest = timetable.steps_per_epoch - len(position.losses)
    return evaluate(position.after_steps([1.0] * rest, 1.0), val_exact).after_epoch(100)


def evaluate(position, val_exact):
    return position.after_evaluation(2.0, val_exact, seconds=0.5)


def walk(timetable):
    """The steps after which training pauses."""
    position, pauses = Position(), []
    while not timetable.is_over(position):
        steps = timetable.steps_to_pause(position)
        position = position.after_steps([1.0] * steps, 1.0)
        pauses.append(position.step)
        if timetable.evaluates(position):
            position = evaluate(position, 0.5)
            if timetable.ends_epoch(position):
                position = position.after_epoch(100)
    return pauses


@pytest.mark.parametrize(
    ("settings", "pauses"),
    [
        ({"logging_steps": 100}, [10, 20, 30]),
        ({"logging_steps": 7}, [7, 10, 14, 20, 21, 28, 30]),
        (
            {"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 8},
            [8, 10, 16, 20, 24, 30],
        ),
        ({"logging_steps": 100, "save_strategy": "steps", "save_steps": 15}, [10, 15, 20, 30]),
        ({"logging_steps": 100, "save_strategy": "no"}, [10, 20, 30]),
    ],
)
def test_training_pauses_where_something_is_due_and_at_the_end_of_each_epoch(settings, pauses):
    assert walk(make(**settings)) == pauses


def test_without_validation_rows_only_epochs_are_evaluated():
    assert walk(make(validates=False, eval_strategy="steps", eval_steps=4)) == [10, 20, 30]


def test_patience_ends_training_and_the_epoch_under_way():
    timetable = make(eval_strategy="steps", eval_steps=4, early_stopping_patience=1)
    position = evaluate(Position().after_steps([1.0] * 4, 1.0), 0.5)
    assert not timetable.ends_epoch(position)
    position = evaluate(position.after_steps([1.0] * 4, 1.0), 0.25)
    assert timetable.ends_epoch(position)
    assert timetable.is_over(position.after_epoch(100))


def test_the_student_is_saved_after_each_epoch_and_within_where_it_is_the_best():
    timetable = make(eval_strategy="steps", eval_steps=4)
    better = evaluate(Position().after_steps([1.0] * 4, 1.0), 0.5)
    worse = evaluate(better.after_steps([1.0] * 4, 1.0), 0.25)
    ended = finish_epoch(worse, timetable, 0.25)
    saved = [timetable.saves(each, evaluated=True) for each in (better, worse, ended)]
    assert saved == ["student", None, "student"]


def test_between_evaluations_only_the_state_is_saved():
    timetable = make(save_strategy="steps", save_steps=5)
    position = Position().after_steps([1.0] * 5, 1.0)
    assert timetable.saves(position, evaluated=False) == "state"
    assert timetable.saves(position.after_steps([1.0], 1.0), evaluated=False) is None


def test_without_a_strategy_only_the_end_is_saved():
    timetable = make(save_strategy="no")
    position, saved = Position(), []
    for _ in range(3):
        position = finish_epoch(position, timetable)
        saved.append(timetable.saves(position, evaluated=True))
    assert saved == [None, None, "student"]
