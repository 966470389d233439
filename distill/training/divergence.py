"""What is wrong where training gives numbers that are none: which rows, and in which words.

Runs in a Ray Train worker. When it is asked for is for ``loop``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from serve.errors import TrainingDiverged, TrainingError

_SKIPPED_AT_MOST = 50
"""fp16 passes over a step whose gradient overflows, and lowers its loss scale by half. From
DeepSpeed's highest scale to its lowest is less than half as many."""

_REMEDY = (
    "Lower train.learning_rate or train.max_grad_norm, or raise train.warmup_ratio or "
    "train.warmup_steps."
)


@dataclass(frozen=True)
class TakenStep:
    """What a rank knows of a step it has taken.

    Attributes:
        loss: Its part of the step's loss.
        losses: float32[N] of each micro batch, as ``weighted_losses`` gives them.
        rows: int64[N] of each, the row that each of these is of.
        skipped: Whether the weights stayed as they were, since a gradient was not finite.
    """

    loss: torch.Tensor
    losses: tuple[torch.Tensor, ...]
    rows: tuple[NDArray[np.int64], ...]
    skipped: bool

    def bad_rows(self) -> list[int]:
        """The rows whose loss is not finite."""
        return sorted(
            {
                int(row)
                for rows, losses in zip(self.rows, self.losses, strict=True)
                for row in rows[~torch.isfinite(losses).cpu().numpy()]
            }
        )


class Watch:
    """Sees that a training's losses, gradients and weights are numbers. Every rank has one.

    Args:
        engine: The DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._skipped_in_a_row = 0

    def check(self, losses: Sequence[float], taken: Sequence[TakenStep], first: int) -> None:
        """Look at some steps just taken.

        Args:
            losses: Of each, summed over ranks.
            taken: What this rank knows of each.
            first: Number of the first.

        Raises:
            TrainingError: On all ranks, where a loss is no number, or a gradient was none.
        """
        for number, (loss, step) in enumerate(zip(losses, taken, strict=True), start=first):
            if not math.isfinite(loss):
                raise _explain_step(step, number, loss)
            if step.skipped and not self._engine.fp16_enabled():
                # DeepSpeed passes over such steps in silence; only fp16 is meant to have some.
                raise TrainingError(_diverged(f"a gradient of step {number}", "infinite"))
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if step.skipped else 0
            if self._skipped_in_a_row > _SKIPPED_AT_MOST:
                raise scaled_to_nothing()

    @torch.no_grad()
    def check_weights(self, step: int) -> None:
        """See that all weights are numbers: what is saved, training has to go on from.

        Args:
            step: Optimizer steps done.

        Raises:
            TrainingError: On all ranks, where they are not. Without ZeRO nothing keeps a
                gradient that is none from the weights.
        """
        # Under ZeRO-3 a parameter is empty but for its part.
        weights = [getattr(p, "ds_tensor", p) for p in self._engine.module.parameters()]
        finite = torch.stack([torch.isfinite(w).all().to(self._engine.device) for w in weights])
        bad = (~finite).any().float()
        dist.all_reduce(bad)
        if bad:
            raise TrainingError(_diverged(f"a weight after step {step}", "nan or infinite"))


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


def _explain_step(step: TakenStep, number: int, loss: float) -> TrainingError:
    """Why the loss of a step is not finite. Every rank calls it, and gets the same.

    Args:
        step: What this rank knows of it.
        number: The step's.
        loss: The step's, summed over ranks.
    """
    mine = {int(row) for rows in step.rows for row in rows}
    of_ranks: list[tuple[list[int], int]] = [([], 0)] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (step.bad_rows(), len(mine - {-1})))
    rows = sorted(row for bad, _ in of_ranks for row in bad if row >= 0)
    total = sum(num_rows for _, num_rows in of_ranks)
    message = _diverged(f"the loss of step {number}", str(loss))
    if len(rows) == total > 1:
        return TrainingError(f"{message} It is so for each of its rows: the weights have diverged.")
    if not rows:
        return TrainingError(f"{message} It is none of its {total} rows alone.")
    return TrainingDiverged(
        f"Training diverged: the loss of step {number} is {loss}, expected a finite number, for "
        f"{len(rows)} of its {total} rows. Leave them out, if it is the same rows in each attempt. "
        f"If not: {_REMEDY} The rows are",
        rows,
    )


def scaled_to_nothing() -> TrainingError:
    """What is said when fp16 passes over step after step."""
    return TrainingError(
        "Training diverged: in fp16 the gradients of step after step overflow, however low the "
        f"loss scale. {_REMEDY} Or use train.bf16, whose numbers reach as far as float32's."
    )
