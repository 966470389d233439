"""How far a training has come, and how each thing that happens in it takes it further.

Pure: what is measured goes in, the next position comes out. A position is what a checkpoint
needs besides the engine's own state, which is for ``checkpoints``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from serve.errors import TrainingError


@dataclass(frozen=True)
class Position:
    """How far training has come.

    Attributes:
        history: A summary of each finished epoch: epoch, steps, train_loss, val_loss,
            val_exact, seconds, tokens_per_s.
        losses: Of the steps done in the epoch under way.
        seconds: Spent on these.
        eval_seconds: Spent on evaluations within the epoch under way.
        evaluations: All that there have been; see ``choice``.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    eval_seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Optimizer steps done, of the finished epochs and the one under way."""
        return self._epoch_start + len(self.losses)

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1."""
        return len(self.history) + 1

    @property
    def _epoch_start(self) -> int:
        return sum(epoch["steps"] for epoch in self.history)

    def after_steps(self, losses: list[float], seconds: float) -> "Position":
        """The position after more steps of the epoch under way."""
        return replace(self, losses=[*self.losses, *losses], seconds=self.seconds + seconds)

    def after_evaluation(
        self, val_loss: float | None, val_exact: float | None, seconds: float
    ) -> "Position":
        """The position after an evaluation.

        Args:
            val_loss, val_exact: What was found; None without validation rows.
            seconds: What it took.
        """
        last = self.evaluations[-1]["step"] if self.evaluations else 0
        new_losses = self.losses[max(0, last - self._epoch_start) :]
        evaluation = {
            "step": self.step,
            "epoch": self.epoch,
            "train_loss": sum(new_losses) / len(new_losses),
            "val_loss": val_loss,
            "val_exact": val_exact,
        }
        return replace(
            self,
            evaluations=[*self.evaluations, evaluation],
            eval_seconds=self.eval_seconds + seconds,
        )

    def after_epoch(self, num_tokens: int) -> "Position":
        """The position after the epoch under way, whose last step has been evaluated.

        Args:
            num_tokens: Of the epoch's steps.
        """
        evaluation = self.evaluations[-1]
        summary = {
            "epoch": self.epoch,
            "steps": len(self.losses),
            "train_loss": sum(self.losses) / len(self.losses),
            "val_loss": evaluation["val_loss"],
            "val_exact": evaluation["val_exact"],
            "seconds": self.seconds + self.eval_seconds,
            "tokens_per_s": num_tokens / self.seconds,
        }
        return Position([*self.history, summary], evaluations=self.evaluations)

    @classmethod
    def read(cls, saved: Mapping[str, Any], steps_per_epoch: int) -> "Position":
        """A position as it was saved, maybe by an earlier version that knew less.

        Args:
            saved: Its fields.
            steps_per_epoch: Optimizer steps of a whole epoch.

        Raises:
            TrainingError: A later version saved it, with what this one does not know.
        """
        unknown = sorted(saved.keys() - {each.name for each in fields(cls)})
        if unknown:
            raise TrainingError(
                f"The checkpoint was saved by another version of raydistill: it holds "
                f"{', '.join(unknown)}, which this one does not know. Go on with that version, or "
                "remove the run's checkpoints to train anew."
            )
        history = [{"steps": steps_per_epoch, **epoch} for epoch in saved["history"]]
        ends = [{"step": steps_per_epoch * epoch["epoch"], **epoch} for epoch in history]
        return cls(**{"evaluations": ends, **saved, "history": history})
