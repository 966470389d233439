"""What training tells the driver as it goes. Pure: makes the events; ``mailbox`` carries them.

Each says ``event``, ``step`` of ``num_steps`` optimizer steps and ``epoch`` of ``num_epochs``;
what came before an interruption counts as done.

    train_start  first, and again after an interruption
    train_step   every ``logging_steps`` steps, and wherever training pauses: ``loss``, the mean
                 since the one before; ``tokens_per_s``; ``learning_rate`` and ``grad_norm`` of
                 the last step, the latter None where it is not known
    train_eval   after each evaluation: its ``train_loss``, ``val_loss`` and ``val_exact``; see
                 ``choice``
    train_epoch  after each epoch: its summary; see ``position``
    train_stop   where patience ends training: ``evaluations_since_best``
"""

from dataclasses import dataclass
from typing import Any

from distill.training.position import Position
from distill.training.timetable import Timetable

Event = dict[str, Any]


@dataclass(frozen=True)
class Events:
    """The events of one training.

    Attributes:
        timetable: Of that training.
    """

    timetable: Timetable

    def start(self, position: Position) -> Event:
        """Training begins, or goes on, from here."""
        return self._event("train_start", position.step, position.epoch)

    def step(self, position: Position, **measured: float | None) -> Event:
        """Steps were done, the last of them before this position."""
        return {**self._event("train_step", position.step, position.epoch), **measured}

    def evaluated(self, position: Position) -> list[Event]:
        """An evaluation was made; with it the epoch may have ended, and training."""
        evaluation = position.evaluations[-1]
        step, epoch = evaluation["step"], evaluation["epoch"]
        events = [{**self._event("train_eval", step, epoch), **evaluation}]
        if not position.losses:
            events.append({**self._event("train_epoch", step, epoch), **position.history[-1]})
        if self.timetable.gives_up(position):
            waited = self.timetable.since_best(position)
            stop = self._event("train_stop", step, epoch)
            events.append({**stop, "evaluations_since_best": waited})
        return events

    def _event(self, name: str, step: int, epoch: int) -> Event:
        return {
            "event": name,
            "step": step,
            "num_steps": self.timetable.num_steps,
            "epoch": epoch,
            "num_epochs": self.timetable.train.num_train_epochs,
        }
