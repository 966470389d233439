"""What is wrong where training gives numbers that are none: which rows, and in which words.

Runs in a Ray Train worker. When it is asked for is for ``loop``.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distill.training.batches import Batch, Step
from distill.training.engine import weighted_losses
from serve.errors import TrainingDiverged, TrainingError

_SKIPPED_AT_MOST = 50
"""fp16 passes over a step whose gradient overflows, and lowers its loss scale by half. From
DeepSpeed's highest scale to its lowest is less than half as many."""

_REMEDY = (
    "Lower train.learning_rate or train.max_grad_norm, or raise train.warmup_ratio or "
    "train.warmup_steps."
)


class Watch:
    """Sees that a training's losses and gradients are numbers. Every rank has one.

    Args:
        engine: The DeepSpeed engine.
        make_batch: Makes the batch of some rows, or of none.
    """

    def __init__(self, engine: Any, make_batch: Callable[[Sequence[int]], Batch]) -> None:
        self._engine = engine
        self._make_batch = make_batch
        self._skipped = self._skipped_in_a_row = 0

    def check(self, losses: Sequence[float], steps: Sequence[Step], first: int) -> None:
        """Look at some steps just taken.

        Args:
            losses: Of each, summed over ranks.
            steps: Those.
            first: Number of the first.

        Raises:
            TrainingError: On all ranks, where a loss is no number, or a gradient was none.
        """
        for number, (loss, step) in enumerate(zip(losses, steps, strict=True), start=first):
            if not math.isfinite(loss):
                raise _explain_step(self._engine, step, self._make_batch, number, loss)
        skipped = self._engine.skipped_steps - self._skipped
        self._skipped = self._engine.skipped_steps
        if skipped and not self._engine.fp16_enabled():
            # DeepSpeed passes over such steps in silence; only fp16 is meant to have some.
            last = first + len(steps) - 1
            raise TrainingError(_diverged(f"a gradient of steps {first} to {last}", "infinite"))
        all_skipped = skipped == len(losses)
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if all_skipped else 0
        if self._skipped_in_a_row > _SKIPPED_AT_MOST:
            raise scaled_to_nothing()


def check_loss(loss: float, name: str) -> float:
    """The loss, if it is a number.

    Raises:
        TrainingError: It is not.
    """
    if not math.isfinite(loss):
        raise TrainingError(_diverged(name, str(loss)))
    return loss


def _diverged(name: str, found: str) -> str:
    """A message about a number that is none."""
    return f"Training diverged: {name} is {found}, expected a finite number. {_REMEDY}"


@torch.no_grad()
def _explain_step(
    engine: Any, step: Step, make_batch: Callable[[Sequence[int]], Batch], number: int, loss: float
) -> TrainingError:
    """Why the loss of a step is not finite. Every rank calls it, and gets the same.

    Args:
        engine: The DeepSpeed engine, with the weights that it has now.
        step: The step's rows, which are each tried alone.
        make_batch: Makes the batch of some rows, or of none.
        number: The step's.
        loss: The step's.
    """
    engine.eval()
    ranks = [[row for micro in micros for row in micro] for micros in step.micro_batches]
    mine, found = ranks[dist.get_rank()], []
    # As often on each rank: under ZeRO-3 the forward pass is a collective operation.
    for place in range(max(map(len, ranks))):
        row = mine[place : place + 1]
        if not torch.isfinite(weighted_losses(engine, make_batch(row)).sum()):
            found += row
    of_ranks: list[list[int]] = [[] for _ in ranks]
    dist.all_gather_object(of_ranks, found)
    rows, total = sorted(itertools.chain.from_iterable(of_ranks)), sum(map(len, ranks))
    message = _diverged(f"the loss of step {number}", str(loss))
    if len(rows) == total > 1:
        return TrainingError(f"{message} It is so for each of its rows: the weights have diverged.")
    if not rows:
        return TrainingError(f"{message} It is none of its {total} rows alone.")
    return TrainingDiverged(f"{message} It is so for {len(rows)} of its {total} rows:", rows)


def scaled_to_nothing() -> TrainingError:
    """What is said when fp16 passes over step after step."""
    return TrainingError(
        "Training diverged: in fp16 the gradients of step after step overflow, however low the "
        f"loss scale. {_REMEDY} Or use train.bf16, whose numbers reach as far as float32's."
    )
