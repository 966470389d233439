"""The training loop that each Ray Train worker runs.

Data, engine, steps, validation, checkpoint, progress: the whole of it reads from
``train_loop_per_worker`` down. What is trained on is decided in ``batches``, how in
``engine``, what is left behind in ``checkpoints``; ``job`` starts it.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from distill.config import TrainConfig
from distill.training.base_model import load_tokenizer, local_base
from distill.training.batches import (
    Batch,
    EncodedRows,
    Step,
    collate,
    count_steps,
    derive_seed,
    plan_epoch,
)
from distill.training.checkpoints import Position, resume, save_epoch, save_step
from distill.training.engine import check_packing, start_engine, validate_batch, weighted_loss_sum
from serve.errors import DistillError, TrainingCancelled, TrainingError


def train_loop_per_worker(config: dict[str, Any]) -> DistillError | None:
    """Train the student, from the latest checkpoint on.

    Args:
        config: ``train`` (TrainConfig as a dict), ``base`` (Hugging Face directory or id),
            ``prompt_weight``, ``dropout``, ``use_gpu``, ``num_threads``, ``rows`` and
            ``val_rows`` (object references of EncodedRows) and ``mailbox`` (actor that takes
            progress events and says when to stop).

    Returns:
        Why training ended early, where it must not be tried again; else None.
    """
    torch.set_num_threads(config["num_threads"])
    try:
        Training(config).run()
    except (TrainingError, TrainingCancelled) as error:
        # Returned, since Ray Train would run a loop that raises again, to the same end.
        return error
    return None


class Training:
    """One worker's part of a training run."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.train = TrainConfig.model_validate(config["train"])
        self.rows, self.val_rows = ray.get([config["rows"], config["val_rows"]])
        self.prompt_weight: float = config["prompt_weight"]
        self.rank = ray.train.get_context().get_world_rank()
        self.world_size = ray.train.get_context().get_world_size()
        self.steps_per_epoch = count_steps(
            len(self.rows),
            self.world_size,
            self.train.per_device_train_batch_size,
            self.train.gradient_accumulation_steps,
        )
        self.progress = Progress(config["mailbox"] if self.rank == 0 else None)
        with local_base(config["base"]) as base:
            self.tokenizer = load_tokenizer(base)
            self.engine = start_engine(
                self.train,
                base,
                self.tokenizer,
                num_steps=self.steps_per_epoch * self.train.num_train_epochs,
                use_gpu=config["use_gpu"],
                dropout=config["dropout"],
            )
        if self.train.packing:
            check_packing(self.engine)

    def run(self) -> None:
        """Train what is left."""
        position = resume(self.engine)
        if len(position.history) == self.train.num_train_epochs:
            return
        number = self._steps_done(position)
        self.progress.send(self._event("train_start", len(position.history) + 1, number))
        self._agree([], number)
        while len(position.history) < self.train.num_train_epochs:
            position = self._train_epoch(position)

    def _train_epoch(self, position: Position) -> Position:
        """Train the epoch under way to its end, validate and save."""
        started = time.monotonic()
        losses = self._train_steps(position)
        trained_s = position.seconds + time.monotonic() - started
        val_loss, val_exact = self._validate() if len(self.val_rows) else (None, None)
        summary = {
            "epoch": len(position.history) + 1,
            "train_loss": sum(losses) / len(losses),
            "val_loss": val_loss,
            "val_exact": val_exact,
            "seconds": position.seconds + time.monotonic() - started,
            "tokens_per_s": int(self.rows.offsets[-1]) / trained_s,
        }
        position = Position(history=[*position.history, summary])
        epoch = len(position.history)
        if epoch == self.train.num_train_epochs or self.train.save_strategy != "no":
            save_epoch(self.engine, position, self.tokenizer)
        event = self._event("train_epoch", epoch, self._steps_done(position))
        self.progress.send({**event, **summary}, wait=True)
        return position

    def _train_steps(self, position: Position) -> list[float]:
        """The steps that are left of the epoch under way; returns the losses of all its steps."""
        self.engine.train()
        started = since = time.monotonic()
        losses, window, tokens = list(position.losses), [], 0
        epoch = len(position.history) + 1
        plan = self._plan(self.rows, self.prompt_weight, epoch)
        first = self._steps_done(position) + 1
        for number, step in enumerate(plan[len(losses) :], start=first):
            window.append(self._step(step, number))
            tokens += self._count_tokens(step)
            ends = number % len(plan) == 0
            saves = not ends and self._saves_at(number)
            if not (ends or saves or number % self.train.logging_steps == 0):
                continue
            agreed = self._agree(window, number)
            losses += agreed
            event = self._event("train_step", epoch, number)
            event["loss"] = sum(agreed) / len(agreed)
            event["tokens_per_s"] = tokens / (time.monotonic() - since)
            self.progress.send(event)
            if saves:
                seconds = position.seconds + time.monotonic() - started
                save_step(self.engine, Position(position.history, list(losses), seconds))
            window, since, tokens = [], time.monotonic(), 0
        return losses

    def _saves_at(self, number: int) -> bool:
        return self.train.save_strategy == "steps" and number % self.train.save_steps == 0

    def _steps_done(self, position: Position) -> int:
        return len(position.history) * self.steps_per_epoch + len(position.losses)

    def _event(self, name: str, epoch: int, number: int) -> dict[str, Any]:
        """An event after so many steps, with all that a progress bar needs."""
        return {
            "event": name,
            "step": number,
            "num_steps": self.steps_per_epoch * self.train.num_train_epochs,
            "epoch": epoch,
            "num_epochs": self.train.num_train_epochs,
        }

    def _step(self, step: Step, number: int) -> torch.Tensor:
        """Train on one step; returns this rank's part of its loss."""
        # Each rank's own, and the same whether or not the run was interrupted before.
        torch.manual_seed(derive_seed(self.train.seed, number, self.rank))
        # DeepSpeed averages over ranks and micro batches, where the loss of a step is one
        # mean over the tokens of all of them.
        scale = self.world_size * self.train.gradient_accumulation_steps / step.loss_weight
        total = torch.zeros((), device=self.engine.device)
        for indices in step.micro_batches[self.rank]:
            batch = self._batch(self.rows, indices, self.prompt_weight)
            loss = weighted_loss_sum(self.engine, batch)
            self.engine.backward(loss * scale)
            self.engine.step()
            total += loss.detach()
        return total / step.loss_weight

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Mean loss of a completion token, and the share of completions found exactly.

        All ranks share the rows.
        """
        self.engine.eval()
        plan = self._plan(self.val_rows, prompt_weight=0.0, epoch=0, accumulation=1)
        total = torch.zeros(2, device=self.engine.device)
        for step in plan:
            batch = self._batch(self.val_rows, step.micro_batches[self.rank][0], 0.0)
            total += validate_batch(self.engine, batch)
        dist.all_reduce(total)
        loss, exact = total.tolist()
        loss /= sum(step.loss_weight for step in plan)
        return _finite(loss, "the validation loss"), exact / len(self.val_rows)

    def _batch(self, rows: EncodedRows, indices: Sequence[int], prompt_weight: float) -> Batch:
        return collate(rows, indices, prompt_weight, self.tokenizer.pad_token_id)

    def _plan(
        self, rows: EncodedRows, prompt_weight: float, epoch: int, accumulation: int | None = None
    ) -> list[Step]:
        return plan_epoch(
            rows.lengths,
            rows.loss_weights(prompt_weight),
            world_size=self.world_size,
            micro_batch_size=self.train.per_device_train_batch_size,
            accumulation=accumulation or self.train.gradient_accumulation_steps,
            seed=self.train.seed,
            epoch=epoch,
        )

    def _agree(self, window: Sequence[torch.Tensor], last: int) -> list[float]:
        """The losses of the steps up to ``last``, summed over ranks.

        Raises:
            TrainingCancelled: On all ranks, where rank 0 has been told to stop.
        """
        cancelled = torch.tensor(float(self.progress.is_cancelled()), device=self.engine.device)
        sums = torch.stack([cancelled, *window])
        dist.all_reduce(sums)
        stop, *losses = sums.tolist()
        if stop:
            raise TrainingCancelled(f"Training was cancelled after step {last}.")
        first = last - len(window) + 1
        agreed = [_finite(loss, f"the loss of step {first + i}") for i, loss in enumerate(losses)]
        if self.engine.skipped_steps and not self.engine.fp16_enabled():
            # DeepSpeed passes over such steps in silence; only fp16 is meant to have some.
            raise TrainingError(_diverged(f"a gradient of steps {first} to {last}", "infinite"))
        return agreed

    def _count_tokens(self, step: Step) -> int:
        lengths = self.rows.lengths
        return sum(int(lengths[i]) for rank in step.micro_batches for micro in rank for i in micro)


class Progress:
    """Talks with the driver, from rank 0 only."""

    def __init__(self, mailbox: Any | None) -> None:
        self._mailbox = mailbox

    def is_cancelled(self) -> bool:
        """Whether the driver wants training to stop."""
        return self._mailbox is not None and ray.get(self._mailbox.is_cancelled.remote())

    def send(self, event: dict[str, Any], wait: bool = False) -> None:
        """Send an event; with ``wait``, until it and all before it have arrived."""
        if self._mailbox is None:
            return
        sent = self._mailbox.put.remote(event)
        if wait:
            ray.get(sent)


def _finite(loss: float, name: str) -> float:
    if loss != loss or abs(loss) == float("inf"):
        raise TrainingError(_diverged(name, str(loss)))
    return loss


def _diverged(name: str, found: str) -> str:
    return (
        f"Training diverged: {name} is {found}, expected a finite number. Lower "
        "train.learning_rate or train.max_grad_norm, or raise train.warmup_ratio."
    )
