"""The training loop that each Ray Train worker runs.

Data, engine, steps, validation, checkpoint, report: the line reads from
``train_loop_per_worker`` down. What is trained on is decided in ``batches``, what a rank does
of it in ``steps``, how in ``engine``, when something is due in ``timetable``, what is left
behind in ``checkpoints``, what the driver is told in ``events``; ``fit`` starts it.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist

from distill.config import LoraConfig, TrainConfig
from distill.training.base_model import load_tokenizer, local_base
from distill.training.batches import Step, count_steps
from distill.training.checkpoints import resume, save_step, save_student
from distill.training.choice import quality
from distill.training.divergence import Watch
from distill.training.engine import check_packing, start_engine
from distill.training.events import Events
from distill.training.mailbox import Progress
from distill.training.position import Position
from distill.training.steps import RankSteps
from distill.training.timetable import Timetable
from serve.errors import DistillError, TrainingCancelled


def train_loop_per_worker(config: dict[str, Any]) -> DistillError | None:
    """Train the student, from the latest checkpoint on.

    Args:
        config: ``train`` (TrainConfig as a dict), ``base`` (Hugging Face directory or id),
            ``prompt_weight``, ``dropout``, ``lora`` (LoraConfig as a dict, or None), ``use_gpu``,
            ``num_threads``, ``rows`` and ``val_rows`` (object references of EncodedRows) and
            ``mailbox`` (actor that takes progress events and says when to stop).

    Returns:
        Why training ended early, where it must not be tried again; else None.
    """
    torch.set_num_threads(config["num_threads"])
    try:
        Training(config).run()
    except DistillError as error:
        # Returned, as what is raised may be tried again, and this would come to the same end.
        return error
    return None


class Training:
    """One worker's part of a training run."""

    def __init__(self, config: dict[str, Any]) -> None:
        train = TrainConfig.model_validate(config["train"])
        rows, self.val_rows = ray.get([config["rows"], config["val_rows"]])
        steps_per_epoch = count_steps(
            len(rows),
            dist.get_world_size(),
            train.per_device_train_batch_size,
            train.gradient_accumulation_steps,
        )
        self.timetable = Timetable(train, steps_per_epoch, validates=len(self.val_rows) > 0)
        self.events = Events(self.timetable)
        self.progress = Progress(config["mailbox"] if dist.get_rank() == 0 else None)
        with local_base(config["base"]) as base:
            self.tokenizer = load_tokenizer(base)
            self.engine = start_engine(
                train,
                base,
                self.tokenizer,
                num_steps=self.timetable.num_steps,
                use_gpu=config["use_gpu"],
                dropout=config["dropout"],
                lora=LoraConfig.model_validate(config["lora"]) if config["lora"] else None,
            )
        if train.packing:
            check_packing(self.engine)
        pad_id = self.tokenizer.pad_token_id
        self.steps = RankSteps(self.engine, rows, train, config["prompt_weight"], pad_id)
        self.watch = Watch(self.engine)

    def run(self) -> None:
        """Train what is left."""
        position = resume(self.engine, self.timetable.steps_per_epoch)
        if self.timetable.is_over(position):
            return
        self.progress.send(self.events.start(position))
        self._agree([], position.step)
        while not self.timetable.is_over(position):
            position = self._train_epoch(position)

    def _train_epoch(self, position: Position) -> Position:
        """Train what is left of the epoch under way, and do on the way what is due."""
        epoch, plan = position.epoch, self.steps.plan(position.epoch)
        self.engine.train()
        while position.epoch == epoch:
            position = self._train_to_pause(position, plan)
            if self.timetable.evaluates(position):
                position = self._evaluate(position, plan)
            else:
                self._save(position, evaluated=False)
        return position

    def _train_to_pause(self, position: Position, plan: Sequence[Step]) -> Position:
        """Take the steps up to where something is due next; check and tell what they gave."""
        started, done = time.monotonic(), len(position.losses)
        steps = plan[done : done + self.timetable.steps_to_pause(position)]
        first, last = position.step + 1, position.step + len(steps)
        taken = [self.steps.take(step, number) for number, step in enumerate(steps, start=first)]
        losses = self._agree([each.loss for each in taken], last)
        self.watch.check(losses, taken, first)
        seconds = time.monotonic() - started
        position = position.after_steps(losses, seconds)
        self.progress.send(
            self.events.step(
                position,
                loss=sum(losses) / len(losses),
                tokens_per_s=self.steps.count_tokens(steps) / seconds,
                learning_rate=self.steps.learning_rate,
                grad_norm=self.steps.grad_norm(),
            )
        )
        return position

    def _evaluate(self, position: Position, plan: Sequence[Step]) -> Position:
        """Validate, end the epoch where it ends or patience does, save and report."""
        started = time.monotonic()
        val_loss, val_exact = self.steps.validate(self.val_rows)
        seconds = time.monotonic() - started
        position = position.after_evaluation(val_loss, val_exact, seconds)
        if self.timetable.ends_epoch(position):
            done = plan[: len(position.losses)]
            position = position.after_epoch(self.steps.count_tokens(done))
        self._save(position, evaluated=True)
        for event in self.events.evaluated(position):
            self.progress.send(event, wait=True)
        return position

    def _save(self, position: Position, evaluated: bool) -> None:
        what = self.timetable.saves(position, evaluated)
        if what is not None:
            self.watch.check_weights(position.step)
        if what == "state":
            save_step(self.engine, position)
        elif what == "student":
            score = quality(position.evaluations[-1], self.timetable.train.select_by)
            save_student(self.engine, position, self.tokenizer, score)

    def _agree(self, losses: Sequence[torch.Tensor], last: int) -> list[float]:
        """The losses of the steps up to ``last``, summed over ranks.

        Raises:
            TrainingCancelled: On all ranks, where rank 0 has been told to stop.
        """
        summed, stop = self.steps.agree(losses, self.progress.is_cancelled())
        if stop:
            raise TrainingCancelled(f"Training was cancelled after step {last}.")
        return summed
