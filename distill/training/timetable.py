"""When training pauses between steps, and what is due then: to evaluate, to save, to end.

Pure: settings and a position in, a decision out. Which evaluation is the better one is for
``choice``; carrying the decisions out is for ``loop``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distill.config import TrainConfig
from distill.training.choice import is_among_best, num_kept, since_best
from distill.training.position import Position


@dataclass(frozen=True)
class Timetable:
    """What is due when, for one training.

    Attributes:
        train: Its settings.
        steps_per_epoch: Optimizer steps of a whole epoch.
        validates: Whether there are validation rows.
    """

    train: TrainConfig
    steps_per_epoch: int
    validates: bool

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.steps_per_epoch * self.train.num_train_epochs

    def is_over(self, position: Position) -> bool:
        """Whether no step is left to do."""
        done = len(position.history) == self.train.num_train_epochs
        return done or self.gives_up(position)

    def gives_up(self, position: Position) -> bool:
        """Whether so many evaluations have been no better that patience is at its end."""
        patience = self.train.early_stopping_patience
        return patience is not None and self.since_best(position) >= patience

    def since_best(self, position: Position) -> int:
        """How many evaluations there have been since the best."""
        return since_best(position.evaluations, self.train.select_by)

    def steps_to_pause(self, position: Position) -> int:
        """How many steps there are from here to where something is due, at least 1."""
        rest = self.steps_per_epoch - len(position.losses)
        return min(rest, *(every - position.step % every for every in self._periods()))

    def evaluates(self, position: Position) -> bool:
        """Whether an evaluation is due after the steps done."""
        evals = self._evaluates_within and position.step % self.train.eval_steps == 0
        return evals or len(position.losses) == self.steps_per_epoch

    def ends_epoch(self, position: Position) -> bool:
        """Whether the epoch under way ends with the evaluation just made."""
        return len(position.losses) == self.steps_per_epoch or self.gives_up(position)

    def saves(self, position: Position, evaluated: bool) -> Literal["student", "state"] | None:
        """What is saved after the steps done, if anything: the state, with or without a student.

        A student is saved at the end of an epoch, and where it is one of the best within.

        Args:
            position: Where training is; at the end of an epoch, none is under way.
            evaluated: Whether an evaluation was made of it.
        """
        if self.train.save_strategy == "no":
            return "student" if self.is_over(position) else None
        if evaluated and (not position.losses or self._is_among_best(position)):
            return "student"
        due = self._saves_within and position.step % self.train.save_steps == 0
        return "state" if due else None

    def _is_among_best(self, position: Position) -> bool:
        select_by = self.train.select_by
        limit = num_kept(self.train.save_total_limit, select_by)
        return is_among_best(position.evaluations, select_by, limit)

    @property
    def _evaluates_within(self) -> bool:
        return self.validates and self.train.eval_strategy == "steps"

    @property
    def _saves_within(self) -> bool:
        return self.train.save_strategy == "steps"

    def _periods(self) -> Iterator[int]:
        """Every how many steps something is due."""
        yield self.train.logging_steps
        if self._evaluates_within:
            yield self.train.eval_steps
        if self._saves_within:
            yield self.train.save_steps
