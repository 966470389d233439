"""Which of a run's evaluations is the best, and what their course says. Pure: numbers in and out.

An evaluation is what was measured at one point of the training: ``step``, ``epoch``,
``train_loss`` since the one before, ``val_loss`` and ``val_exact``, which are None without
validation rows. When there is one is for ``timetable``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.config import SelectBy

Evaluation = Mapping[str, Any]

METRIC_CANDIDATES = 3
"""Checkpoints that the program's metric chooses from, unless another number is given."""

# A loss that is no more than this above its lowest, or times it, is no sign of anything.
_RISE, _TIMES = 0.02, 1.1
_LONG = 2


def quality(evaluation: Evaluation, select_by: SelectBy = "exact") -> float:
    """How good the student of an evaluation is; more is better.

    By ``exact``, and by ``metric`` as long as training lasts, first counts how many
    validation completions it would give exactly, then their loss: a student goes on getting
    more answers right long after the loss of the ones that it gets wrong has begun to rise.
    Without validation rows the training loss decides.
    """
    if evaluation["val_loss"] is None:
        return -float(evaluation["train_loss"])
    if select_by == "loss":
        return -float(evaluation["val_loss"])
    return float(evaluation["val_exact"] - 1e-6 * evaluation["val_loss"])


def since_best(evaluations: Sequence[Evaluation], select_by: SelectBy) -> int:
    """How many evaluations there have been since the best; of equals the first is it."""
    if not evaluations:
        return 0
    best = max(range(len(evaluations)), key=lambda i: quality(evaluations[i], select_by))
    return len(evaluations) - 1 - best


def is_among_best(evaluations: Sequence[Evaluation], select_by: SelectBy, limit: int) -> bool:
    """Whether fewer than ``limit`` evaluations before the last are at least as good."""
    *before, last = (quality(evaluation, select_by) for evaluation in evaluations)
    return sum(each >= last for each in before) < limit


def num_kept(save_total_limit: int | None, select_by: SelectBy) -> int:
    """How many checkpoints with a student are kept."""
    return save_total_limit or (METRIC_CANDIDATES if select_by == "metric" else 1)


def overfitting(
    evaluations: Sequence[Evaluation], select_by: SelectBy = "exact", val_rows: int = 100
) -> str | None:
    """What says that the student learned its rows by heart, and what to do; None if nothing does.

    While the training loss went on falling, the validation loss has been above its lowest for
    some evaluations and ends well above it. That alone is the usual course of a student that
    gets more and more answers right and is ever surer of the others, so exact answers must
    have become fewer as well, where the student is chosen by them and gives any.

    Args:
        evaluations: In their order.
        select_by: What the student is chosen by.
        val_rows: How many rows were answered; of few, some more or less are chance.
    """
    if len(evaluations) <= _LONG or any(each["val_loss"] is None for each in evaluations):
        return None
    lowest = min(range(len(evaluations)), key=lambda i: evaluations[i]["val_loss"])
    best, last = evaluations[lowest], evaluations[-1]
    lasted = len(evaluations) - 1 - lowest >= _LONG
    risen = last["val_loss"] > _TIMES * best["val_loss"]
    if not (lasted and risen and last["train_loss"] < best["train_loss"]):
        return None
    most = max(evaluations, key=quality)
    lately = max(each["val_exact"] for each in evaluations[-_LONG:])
    chance = val_rows**-0.5
    if select_by == "loss" or most["val_exact"] <= chance:
        learned_by_heart = last["val_loss"] - best["val_loss"] > _RISE
    else:
        learned_by_heart = most["val_exact"] - lately > chance
    if not learned_by_heart:
        return None
    return (
        f"Overfitting: the validation loss was lowest, {best['val_loss']:.3g}, after "
        f"{_place(best)} and rose to {last['val_loss']:.3g}, while the training loss fell from "
        f"{best['train_loss']:.3g} to {last['train_loss']:.3g}. Exact answers were at most "
        f"{most['val_exact']:.1%}, after {_place(most)}, and are {last['val_exact']:.1%} at the "
        "end. End earlier: lower train.num_train_epochs, or set train.early_stopping_patience. "
        "More examples, more train.weight_decay or more of a scratch student's dropout help."
    )


def _place(evaluation: Evaluation) -> str:
    return f"epoch {evaluation['epoch']} (step {evaluation['step']:,})"
