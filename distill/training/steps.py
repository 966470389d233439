"""One rank's part of a step and of a validation: which rows, forward, backward, sums over ranks.

Runs in a Ray Train worker. The arithmetic is here that makes a step's loss one mean over the
tokens of all ranks and micro batches. When steps are taken is for ``loop``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distill.config import TrainConfig
from distill.training.batches import Batch, EncodedRows, Step, collate, derive_seed, plan_epoch
from distill.training.divergence import TakenStep, check_loss, scaled_to_nothing
from distill.training.engine import validate_batch, weighted_losses


class RankSteps:
    """What a rank does in each step.

    Attributes:
        learning_rate: Of the last step.
    """

    def __init__(
        self,
        engine: Any,
        rows: EncodedRows,
        train: TrainConfig,
        prompt_weight: float,
        pad_id: int,
    ) -> None:
        self.learning_rate = 0.0
        self._engine = engine
        self._rows = rows
        self._train = train
        self._prompt_weight = prompt_weight
        self._pad_id = pad_id
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def plan(self, epoch: int) -> list[Step]:
        """The steps of an epoch, the same on all ranks."""
        accumulation = self._train.gradient_accumulation_steps
        return self._plan(self._rows, self._prompt_weight, epoch, accumulation)

    def take(self, step: Step, number: int) -> TakenStep:
        """Train on one step."""
        # Each rank's own, and the same whether or not the run was interrupted before.
        torch.manual_seed(derive_seed(self._train.seed, number, self._rank))
        # DeepSpeed averages over ranks and micro batches, where the loss of a step is one
        # mean over the tokens of all of them.
        scale = self._world_size * self._train.gradient_accumulation_steps / step.loss_weight
        self.learning_rate = self._engine.get_lr()[0]
        skipped = self._engine.skipped_steps
        total = torch.zeros((), device=self._engine.device)
        losses, rows = [], []
        for indices in step.micro_batches[self._rank]:
            batch = self.batch(indices)
            token_losses = weighted_losses(self._engine, batch)
            loss = token_losses.sum()
            self._engine.backward(loss * scale)
            self._update()
            total += loss.detach()
            losses.append(token_losses.detach())
            # Of an empty batch's one position, which counts nothing, there is no row.
            rows.append(np.array([*indices, -1])[batch.predicting.nonzero()[0]])
        return TakenStep(
            loss=total / step.loss_weight,
            losses=tuple(losses),
            rows=tuple(rows),
            skipped=self._engine.skipped_steps > skipped,
        )

    def agree(self, losses: Sequence[torch.Tensor], stop: bool) -> tuple[list[float], bool]:
        """Losses summed over ranks, and whether any rank has been told to stop."""
        told = torch.tensor(float(stop), device=self._engine.device)
        sums = torch.stack([told, *losses])
        dist.all_reduce(sums)
        stops, *summed = sums.tolist()
        return summed, bool(stops)

    @torch.no_grad()
    def validate(self, rows: EncodedRows) -> tuple[float, float] | tuple[None, None]:
        """Mean loss of a completion token, and the share of completions found exactly.

        All ranks share the rows; without any there is neither.

        Raises:
            TrainingError: The loss is no number.
        """
        if not len(rows):
            return None, None
        self._engine.eval()
        plan = self._plan(rows, prompt_weight=0.0, epoch=0, accumulation=1)
        total = torch.zeros(2, device=self._engine.device)
        for step in plan:
            batch = collate(rows, step.micro_batches[self._rank][0], 0.0, self._pad_id)
            total += validate_batch(self._engine, batch)
        dist.all_reduce(total)
        loss, exact = total.tolist()
        loss /= sum(step.loss_weight for step in plan)
        self._engine.train()
        return check_loss(loss, "the validation loss"), exact / len(rows)

    def grad_norm(self) -> float | None:
        """Of the last step, before clipping; None where it is not known."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None and math.isfinite(norm) else None

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of some training rows, or of none."""
        return collate(self._rows, indices, self._prompt_weight, self._pad_id)

    def count_tokens(self, steps: Sequence[Step]) -> int:
        """Tokens of the rows of steps, over all ranks."""
        micro_batches = (micro for step in steps for rank in step.micro_batches for micro in rank)
        return sum(int(self._rows.lengths[row]) for micro in micro_batches for row in micro)

    def _plan(
        self, rows: EncodedRows, prompt_weight: float, epoch: int, accumulation: int
    ) -> list[Step]:
        return plan_epoch(
            rows.lengths,
            rows.loss_weights(prompt_weight),
            world_size=self._world_size,
            micro_batch_size=self._train.per_device_train_batch_size,
            accumulation=accumulation,
            seed=self._train.seed,
            epoch=epoch,
        )

    def _update(self) -> None:
        try:
            self._engine.step()
        except Exception as error:
            # DeepSpeed's has no type of its own. All ranks have the same scale.
            if "loss scale already at minimum" in str(error):
                raise scaled_to_nothing() from error
            raise
