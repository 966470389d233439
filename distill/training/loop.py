"""The training loop that each Ray Train worker runs.

Data, engine, steps, validation, checkpoint, progress: the whole of it reads from
``train_loop_per_worker`` down. What is trained on is decided in ``batches``, how in
``engine``, what is left behind in ``checkpoints``, which student is the better one in
``choice``; ``job`` starts it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from distill.config import LoraConfig, TrainConfig
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
from distill.training.checkpoints import Position, resume, save_step, save_student
from distill.training.choice import is_among_best, num_kept, quality, since_best
from distill.training.divergence import (
    SKIPPED_AT_MOST,
    check_loss,
    diverged,
    explain_step,
    scaled_to_nothing,
)
from distill.training.engine import (
    backward,
    check_packing,
    start_engine,
    validate_batch,
    weighted_loss_sum,
)
from distill.training.mailbox import Progress
from distill.training.memory import is_out_of_memory
from serve.errors import DistillError, TrainingCancelled, TrainingError


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
    mailbox = config["mailbox"]
    if (failure := ray.get(mailbox.failure.remote())) is not None:
        return failure
    try:
        Training(config).run()
    except DistillError as error:
        # Returned, since Ray Train would run a loop that raises again, to the same end.
        return error
    except Exception as error:
        if is_out_of_memory(error):
            # Of one rank alone: raised, it ends the others, which wait for it.
            ray.get(mailbox.fail.remote(TrainingError(f"{type(error).__name__}: {error}")))
        raise
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
        self.skipped_in_a_row = self.skipped_before = 0
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
                lora=LoraConfig.model_validate(config["lora"]) if config["lora"] else None,
            )
        if self.train.packing:
            check_packing(self.engine)

    def run(self) -> None:
        """Train what is left."""
        position = resume(self.engine, self.steps_per_epoch)
        if self._is_over(position):
            return
        self.progress.send(self._event("train_start", position.step, len(position.history) + 1))
        self._agree([], position.step)
        while not self._is_over(position):
            position = self._train_epoch(position)

    def _is_over(self, position: Position) -> bool:
        return len(position.history) == self.train.num_train_epochs or self._gives_up(position)

    def _gives_up(self, position: Position) -> bool:
        patience = self.train.early_stopping_patience
        waited = since_best(position.evaluations, self.train.select_by)
        return patience is not None and waited >= patience

    def _train_epoch(self, position: Position) -> Position:
        """Train what is left of the epoch under way; validate, save and report on the way."""
        self.engine.train()
        since, window, tokens = time.monotonic(), [], 0
        epoch = len(position.history) + 1
        plan = self._plan(self.rows, self.prompt_weight, epoch)
        for number, step in enumerate(plan[len(position.losses) :], start=position.step + 1):
            window.append(self._step(step, number))
            tokens += self._count_tokens(step)
            ends = number % len(plan) == 0
            evaluates, saves = ends or self._evaluates_at(number), self._saves_at(number)
            if not (evaluates or saves or number % self.train.logging_steps == 0):
                continue
            agreed = self._agree(window, number)
            self._check(agreed, plan, number)
            seconds = time.monotonic() - since
            position = replace(
                position,
                losses=[*position.losses, *agreed],
                seconds=position.seconds + seconds,
            )
            self._tell_step(number, epoch, sum(agreed) / len(agreed), tokens / seconds)
            if evaluates:
                position = self._evaluate(position, plan)
                if len(position.history) == epoch:
                    break
            elif saves:
                save_step(self.engine, position)
            since, window, tokens = time.monotonic(), [], 0
        return position

    def _evaluate(self, position: Position, plan: Sequence[Step]) -> Position:
        """Validate, end the epoch where it ends or patience does, save and report."""
        started = time.monotonic()
        val_loss, val_exact = self._validate() if len(self.val_rows) else (None, None)
        new_losses = position.losses[self._evaluated(position) :]
        evaluation = {
            "step": position.step,
            "epoch": len(position.history) + 1,
            "train_loss": sum(new_losses) / len(new_losses),
            "val_loss": val_loss,
            "val_exact": val_exact,
        }
        position = replace(
            position,
            evaluations=[*position.evaluations, evaluation],
            eval_seconds=position.eval_seconds + time.monotonic() - started,
        )
        ended = len(position.losses) == len(plan) or self._gives_up(position)
        if ended:
            position = self._end_epoch(position, plan)
        self._save(position, ended)
        self._tell_evaluation(position, ended)
        return position

    def _end_epoch(self, position: Position, plan: Sequence[Step]) -> Position:
        done = plan[: len(position.losses)]
        evaluation = position.evaluations[-1]
        summary = {
            "epoch": evaluation["epoch"],
            "steps": len(done),
            "train_loss": sum(position.losses) / len(done),
            "val_loss": evaluation["val_loss"],
            "val_exact": evaluation["val_exact"],
            "seconds": position.seconds + position.eval_seconds,
            "tokens_per_s": sum(map(self._count_tokens, done)) / position.seconds,
        }
        return Position([*position.history, summary], evaluations=position.evaluations)

    def _evaluated(self, position: Position) -> int:
        """Steps of the epoch under way that an evaluation has counted already."""
        last = position.evaluations[-1]["step"] if position.evaluations else 0
        return max(0, last - (position.step - len(position.losses)))

    def _save(self, position: Position, ended: bool) -> None:
        """Save the student at the end of an epoch, and where it is one of the best within."""
        train, evaluations = self.train, position.evaluations
        if train.save_strategy == "no":
            if not self._is_over(position):
                return
        elif not ended:
            limit = num_kept(train.save_total_limit, train.select_by)
            if not is_among_best(evaluations, train.select_by, limit):
                if self._saves_at(position.step):
                    save_step(self.engine, position)
                return
        score = quality(evaluations[-1], train.select_by)
        save_student(self.engine, position, self.tokenizer, score)

    def _evaluates_at(self, number: int) -> bool:
        due = self.train.eval_strategy == "steps" and number % self.train.eval_steps == 0
        return due and len(self.val_rows) > 0

    def _saves_at(self, number: int) -> bool:
        return self.train.save_strategy == "steps" and number % self.train.save_steps == 0

    def _tell_step(self, number: int, epoch: int, loss: float, tokens_per_s: float) -> None:
        event = self._event("train_step", number, epoch)
        event |= {"loss": loss, "tokens_per_s": tokens_per_s, "learning_rate": self.learning_rate}
        norm = self.engine.get_global_grad_norm()
        known = norm is not None and math.isfinite(norm)
        event["grad_norm"] = float(norm) if known else None
        self.progress.send(event)

    def _tell_evaluation(self, position: Position, ended: bool) -> None:
        evaluation = position.evaluations[-1]
        step, epoch = evaluation["step"], evaluation["epoch"]
        self.progress.send({**self._event("train_eval", step, epoch), **evaluation}, wait=True)
        if ended:
            event = self._event("train_epoch", step, epoch)
            self.progress.send({**event, **position.history[-1]}, wait=True)
        if self._gives_up(position):
            event = self._event("train_stop", step, epoch)
            waited = since_best(position.evaluations, self.train.select_by)
            self.progress.send({**event, "evaluations_since_best": waited}, wait=True)

    def _event(self, name: str, number: int, epoch: int) -> dict[str, Any]:
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
        self.learning_rate = self.engine.get_lr()[0]
        total = torch.zeros((), device=self.engine.device)
        for indices in step.micro_batches[self.rank]:
            batch = self._batch(self.rows, indices, self.prompt_weight)
            loss = weighted_loss_sum(self.engine, batch)
            backward(self.engine, loss * scale)
            self._update()
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
        self.engine.train()
        return check_loss(loss, "the validation loss"), exact / len(self.val_rows)

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
        return losses

    def _check(self, losses: Sequence[float], plan: Sequence[Step], last: int) -> None:
        """See that the losses of the steps up to ``last`` are numbers.

        Raises:
            TrainingError: On all ranks, where one is not, or a gradient was not.
        """
        first = last - len(losses) + 1
        for number, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                step = plan[(number - 1) % len(plan)]
                make_batch = partial(self._batch, self.rows, prompt_weight=self.prompt_weight)
                raise explain_step(self.engine, step, make_batch, number, loss)
        skipped = self.engine.skipped_steps - self.skipped_before
        self.skipped_before = self.engine.skipped_steps
        if skipped and not self.engine.fp16_enabled():
            # DeepSpeed passes over such steps in silence; only fp16 is meant to have some.
            raise TrainingError(diverged(f"a gradient of steps {first} to {last}", "infinite"))
        self.skipped_in_a_row = self.skipped_in_a_row + skipped if skipped == len(losses) else 0
        if self.skipped_in_a_row > SKIPPED_AT_MOST:
            raise scaled_to_nothing()

    def _update(self) -> None:
        try:
            self.engine.step()
        except Exception as error:
            # DeepSpeed's has no type of its own. All ranks have the same scale.
            if "loss scale already at minimum" in str(error):
                raise scaled_to_nothing() from error
            raise

    def _count_tokens(self, step: Step) -> int:
        lengths = self.rows.lengths
        return sum(int(lengths[i]) for rank in step.micro_batches for micro in rank for i in micro)
