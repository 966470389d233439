"""Rows that a tiny student can learn, and its training on them, for the tests of training."""

import json

import ray.train
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from distill.config import StudentConfig, TrainConfig
from distill.training.job import train
from distill.training.loop import train_loop_per_worker

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SCRATCH = StudentConfig(scratch={**SIZES, "dropout": 0.0})
WITH_DROPOUT = StudentConfig(scratch={**SIZES, "dropout": 0.1})
COLOURS = ["red", "green", "blue", "yellow"]


def row(number):
    colour = COLOURS[number % 4]
    question = f"{' please' * (number % 7)} paint item {number}¦{colour}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": colour},
    ]
    return {"messages": messages, "predictor": "p", "example_id": str(number), "folded": True}


def write_rows(folder, num_rows=50, num_val_rows=10):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (
        ("train", range(num_rows)),
        ("val", range(num_rows, num_rows + num_val_rows)),
    ):
        lines = [json.dumps(row(number)) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def never():
    return False


def run(
    folder,
    student=SCRATCH,
    on_event=lambda event: None,
    name="run",
    cancelled=never,
    on_wait=print,
    **settings,
):
    defaults = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "logging_steps": 2}
    return train(
        train_rows=str(folder / "train.jsonl"),
        val_rows=str(folder / "val.jsonl"),
        student=student,
        train=TrainConfig(**defaults | settings),
        storage=str(folder / "checkpoints"),
        name=name,
        on_event=on_event,
        cancelled=cancelled,
        on_wait=on_wait,
    )


def run_out_of_memory(config):
    """The training loop of workers, the second of which has no memory for its third batch."""
    batches = iter(range(3))

    def refuse(*_):
        if ray.train.get_context().get_world_rank() == 1 and next(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    forward = LlamaModel.forward

    def failing(*args, **kwargs):
        refuse()
        return forward(*args, **kwargs)

    LlamaModel.forward = failing
    return train_loop_per_worker(config)


def lose_a_gradient(config):
    """The training loop of workers whose third batch has a loss, but an infinite gradient."""
    batches = iter(range(1, 100))
    forward = LlamaModel.forward

    def losing(*args, **kwargs):
        output = forward(*args, **kwargs)
        if next(batches) == 3:
            output.last_hidden_state.register_hook(lambda gradient: gradient * torch.inf)
        return output

    LlamaModel.forward = losing
    return train_loop_per_worker(config)
