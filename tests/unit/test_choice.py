"""Which evaluation's student is kept, when training gives up, what overfitting looks like."""

import pytest

from distill.training.choice import is_among_best, num_kept, overfitting, quality, since_best


def evaluation(exact, loss, train_loss=1.0, epoch=1):
    return {
        "step": 10 * epoch,
        "epoch": epoch,
        "val_exact": exact,
        "val_loss": loss,
        "train_loss": train_loss,
    }


def course(val_losses, train_losses, exacts=None):
    exacts = exacts or [0.5] * len(val_losses)
    return [
        evaluation(exact, val, train, epoch)
        for epoch, (exact, val, train) in enumerate(
            zip(exacts, val_losses, train_losses, strict=True), start=1
        )
    ]


@pytest.mark.parametrize("select_by", ["exact", "metric"])
def test_more_exact_answers_are_better_and_then_a_lower_loss(select_by):
    ranked = [evaluation(0.8, 0.1), evaluation(0.9, 0.3), evaluation(0.9, 0.2)]
    assert sorted(ranked, key=lambda each: quality(each, select_by)) == ranked


def test_by_loss_only_the_validation_loss_counts():
    ranked = [evaluation(0.9, 0.3), evaluation(0.9, 0.2), evaluation(0.8, 0.1)]
    assert sorted(ranked, key=lambda each: quality(each, "loss")) == ranked


def test_without_validation_rows_the_training_loss_decides():
    assert quality(evaluation(None, None, 0.2)) > quality(evaluation(None, None, 0.3))


def test_evaluations_are_counted_from_the_best_one_by_what_chooses():
    found = course([0.3, 0.2, 0.4, 0.5], [1, 1, 1, 1], [0.1, 0.2, 0.2, 0.9])
    assert since_best(found, "loss") == 2
    assert since_best(found, "exact") == 0
    assert since_best(found[:3], "metric") == 1
    assert since_best([], "loss") == 0


def test_an_equal_evaluation_is_no_improvement():
    assert since_best([evaluation(0.5, 0.2)] * 3, "exact") == 2


def test_only_the_best_so_far_are_worth_a_checkpoint():
    found = course([0.3, 0.2, 0.4], [1, 1, 1])
    assert is_among_best(found[:2], "loss", 1)
    assert not is_among_best(found, "loss", 2)
    assert is_among_best(found, "loss", 3)


def test_the_metric_has_three_checkpoints_to_choose_from_unless_told_otherwise():
    assert [num_kept(None, by) for by in ("exact", "loss", "metric")] == [1, 1, 3]
    assert num_kept(2, "metric") == 2


FALLS = [1.0, 0.8, 0.5, 0.3, 0.2]


def test_overfitting_names_the_best_epochs_and_what_to_do():
    words = overfitting(course([0.5, 0.3, 0.4, 0.5, 0.6], FALLS, [0.5, 0.8, 0.81, 0.6, 0.55]))
    assert "lowest, 0.3, after epoch 2 (step 20) and rose to 0.6" in words
    assert "at most 81.0%, after epoch 3 (step 30), and are 55.0% at the end" in words
    assert "train.early_stopping_patience" in words


@pytest.mark.parametrize("select_by", ["exact", "metric"])
@pytest.mark.parametrize(
    ("val", "exact"),
    [
        ([0.31, 0.30, 0.32, 0.34, 0.36], [0.80, 0.84, 0.87, 0.88, 0.885]),
        ([0.5, 0.0010, 0.0012, 0.0013, 0.0015], [0.9, 1, 1, 1, 1]),
        ([0.5, 0.3, 0.4, 0.5, 0.6], [0.5, 0.80, 0.76, 0.70, 0.73]),
    ],
    ids=["ever more exact", "solved", "chance"],
)
def test_a_rising_loss_alone_is_no_overfitting_where_exact_answers_decide(val, exact, select_by):
    assert overfitting(course(val, FALLS, exact), select_by) is None


def test_of_many_rows_a_small_fall_is_no_chance():
    found = course([0.5, 0.3, 0.4, 0.5, 0.6], FALLS, [0.5, 0.80, 0.76, 0.70, 0.73])
    assert overfitting(found, val_rows=1000)


def test_by_loss_a_rise_of_the_loss_is_overfitting_unless_it_is_tiny():
    exact = [0.80, 0.84, 0.87, 0.88, 0.885]
    assert overfitting(course([0.31, 0.30, 0.32, 0.34, 0.36], FALLS, exact), "loss")
    assert overfitting(course([0.5, 0.0010, 0.0012, 0.0013, 0.0015], FALLS, exact), "loss") is None


def test_the_loss_decides_where_no_answer_is_exact():
    assert overfitting(course([0.5, 0.3, 0.4, 0.5, 0.6], FALLS, [0.0] * 5))


@pytest.mark.parametrize(
    ("val", "train"),
    [
        ([0.5, 0.3, 0.2, 0.1], [1.0, 0.8, 0.5, 0.2]),
        ([0.5, 0.3, 0.31, 0.32], [1.0, 0.8, 0.5, 0.2]),
        ([0.5, 0.3, 0.4, 0.6], [1.0, 0.8, 0.9, 1.2]),
        ([0.3, 0.6], [1.0, 0.5]),
        ([None] * 4, [1.0, 0.8, 0.5, 0.2]),
    ],
    ids=["falls", "noise", "diverges", "short", "no validation"],
)
def test_other_courses_are_not_overfitting(val, train):
    assert overfitting(course(val, train), "loss") is None
