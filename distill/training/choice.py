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

# A loss that is no more than noise above its lowest is no sign of anything.
_RISE = 1.1
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


def overfitting(evaluations: Sequence[Evaluation]) -> str | None:
    """What says that the student learned its rows by heart, and what to do; None if nothing does.

    The validation loss has been above its lowest for some evaluations, and ends well above
    it, while the training loss went on falling.
    """
    if len(evaluations) <= _LONG or any(each["val_loss"] is None for each in evaluations):
        return None
    lowest = min(range(len(evaluations)), key=lambda i: evaluations[i]["val_loss"])
    best, last = evaluations[lowest], evaluations[-1]
    lasted = len(evaluations) - 1 - lowest >= _LONG
    risen = last["val_loss"] > _RISE * best["val_loss"]
    if not (lasted and risen and last["train_loss"] < best["train_loss"]):
        return None
    exact = max(evaluations, key=quality)
    words = (
        f"Overfitting: the validation loss was lowest, {best['val_loss']:.3g}, after "
        f"{_place(best)} and rose to {last['val_loss']:.3g}, while the training loss "
        f"fell from {best['train_loss']:.3g} to {last['train_loss']:.3g}."
    )
    if exact["step"] > best["step"]:
        words += (
            f" Exact answers still rose, from {best['val_exact']:.1%} to "
            f"{exact['val_exact']:.1%} after {_place(exact)}: it is surer of its mistakes."
        )
    else:
        words += " End earlier: lower train.num_train_epochs, or set train.early_stopping_patience."
    return words + (
        " More examples, more train.weight_decay or more of a scratch student's dropout help."
    )


def _place(evaluation: Evaluation) -> str:
    return f"epoch {evaluation['epoch']} (step {evaluation['step']:,})"
