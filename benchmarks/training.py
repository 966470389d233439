"""Training against TRL's SFTTrainer: rows per second, and what the student then gets right.

    make .venv-trl/.installed
    python -m benchmarks.training --data DIR [--snips DIR] [--workers N] [--out FILE]

The folders hold the files of Banking77 and of SNIPS (see ``_rows``); by default the second is
the first one's neighbour. Both trainers start from the same weights and take
the same rows, as full prompts and folded, on as many workers, one after the other on the
same machine; each with the fastest of the batch sizes. Only the training loop is timed:
neither side's start, tokenising or saving. Both learn completions only.

Accuracy is of the truth on the test set: the share of completions that greedy decoding gives
exactly, found by one forward pass with the same code for both.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import ray
import torch

from benchmarks import _rows
from distill import summary
from distill.config import ScratchConfig, StudentConfig, TrainConfig
from distill.rows import Row
from distill.training.base_model import load_model, load_tokenizer, make_scratch
from distill.training.batches import collate, plan_epoch
from distill.training.encoding import encode
from distill.training.engine import validate_batch
from distill.training.job import train
from examples.banking77.program import build

ROOT = Path(__file__).parent.parent
MAX_LENGTH = 4096
RECIPE = {"learning_rate": 1e-3, "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """A program's rows in one form.

    Attributes:
        name: Of the folder that its files are in.
        prompt: ``full`` or ``folded``.
        batch_sizes: The fastest of these is each trainer's.
        timed_rows: How many rows are timed.
        epochs: Over all training rows, for the accuracy; 0 where that would take days.
    """

    name: str
    prompt: str
    batch_sizes: tuple[int, ...]
    timed_rows: int
    epochs: int


@dataclass(frozen=True)
class Setting:
    """What one training is of; the same for both trainers."""

    base: Path
    rows: Path
    out: Path
    workers: int
    batch_size: int
    epochs: int


Trainer = Callable[[Setting], float]
"""Trains, leaves the student in ``out``, and returns the seconds of the training loop."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time training against TRL.")
    parser.add_argument("--data", type=Path, required=True, help="folder of Banking77's files")
    parser.add_argument("--snips", type=Path, help="folder of SNIPS' files")
    parser.add_argument("--trl", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12, help="of Banking77, folded")
    parser.add_argument("--short-epochs", type=int, default=2, help="of the short program")
    parser.add_argument("--short-rows", type=int, default=4000, help="of it, for the accuracy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training.json")
    args = parser.parse_args()
    folders = {"banking77": args.data, "snips": args.snips or args.data.parent / "snips"}
    cases = [
        Case("banking77", "full", (4, 8), 96, 0),
        Case("banking77", "folded", (16, 32, 64, 128), 4000, args.epochs),
        Case("snips", "full", (4, 8, 16), 1000, args.short_epochs),
        Case("snips", "folded", (16, 32, 64), 4000, args.short_epochs),
    ]
    trainers = {"raydistill": _train, "trl": lambda setting: _train_with_trl(args.trl, setting)}
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    figures: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for case in cases:
                bench = Bench(case, folders[case.name], args, Path(scratch))
                found = figures[f"{case.name} {case.prompt}"] = bench.measure(trainers)
                print(case.name, case.prompt, json.dumps(found), flush=True)
                # Half an hour's figures outlive what goes wrong after them.
                _write(args, figures)
    finally:
        ray.shutdown()


def _write(args: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    def ratio(ours: str, theirs: str) -> float:
        return round(
            figures[ours]["raydistill"]["rows_per_s"] / figures[theirs]["trl"]["rows_per_s"], 2
        )

    ratios = {key: ratio(key, key) for key in figures}
    for name in ("banking77", "snips"):
        if f"{name} folded" in figures:
            ratios[f"{name}: ours folded to TRL full"] = ratio(f"{name} folded", f"{name} full")
    version = "import trl, transformers as t; print(trl.__version__, t.__version__)"
    trl = subprocess.run([args.trl, "-c", version], capture_output=True, text=True, check=True)
    everything = {
        "ratios": ratios,
        "cases": figures,
        "workers": args.workers,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "recipe": RECIPE,
        "versions": {**summary.versions(), "trl": trl.stdout.split()},
    }
    args.out.write_text(json.dumps(everything, indent=2) + "\n")
    print(json.dumps(ratios, indent=2), flush=True)


class Bench:
    """Measures one case."""

    def __init__(self, case: Case, data: Path, args: argparse.Namespace, scratch: Path) -> None:
        self.case, self.workers = case, args.workers
        self.folder = scratch / f"{case.name}-{case.prompt}"
        self.folder.mkdir()
        read, program = _PROGRAMS[case.name]
        pairs, test = read(data)
        random.Random(0).shuffle(pairs)
        if case.name == "snips":
            pairs = pairs[: args.short_rows]
        folded = case.prompt == "folded"
        self.rows = _rows.render(program, pairs, folded=folded)[0]
        self.test = _rows.render(program, test, folded=folded)[0]
        self.base = scratch / f"{case.name}-base"
        if not self.base.exists():
            # One for both forms: what differs is the rows alone.
            both = [*self.rows, *_rows.render(program, pairs, folded=not folded)[0]]
            conversations = [row.messages for row in both]
            sizes = ScratchConfig(dropout=0)
            make_scratch(self.base, conversations, sizes, max_length=MAX_LENGTH, seed=0)

    def measure(self, trainers: Mapping[str, Trainer]) -> dict[str, Any]:
        """Figures of each trainer."""
        figures: dict[str, Any] = {name: {"tried": {}} for name in trainers}
        some = self.rows[: self.case.timed_rows]
        for size in self.case.batch_sizes:
            for name, trainer in trainers.items():
                seconds = trainer(self._setting(some, f"{name}-{size}", size, epochs=1))
                figures[name]["tried"][size] = round(len(some) / seconds, 2)
        for name, trainer in trainers.items():
            tried = figures[name]["tried"]
            figures[name]["rows_per_s"] = max(tried.values())
            if self.case.epochs:
                # As many steps for both: what is compared is what the rows teach.
                setting = self._setting(self.rows, f"{name}-all", 32, self.case.epochs)
                figures[name]["all_rows_seconds"] = round(trainer(setting), 1)
                figures[name]["test_accuracy"] = _accuracy(setting.out, self.test)
        return figures

    def _setting(self, rows: list[Row], name: str, batch_size: int, epochs: int) -> Setting:
        out = self.folder / name
        out.mkdir()
        _write_rows(out / "rows.jsonl", rows)
        return Setting(self.base, out / "rows.jsonl", out, self.workers, batch_size, epochs)


_PROGRAMS: dict[str, tuple[Callable[[Path], tuple[list, list]], dspy.Predict]] = {
    "banking77": (_rows.banking77, build()),
    "snips": (_rows.snips, _rows.SHORT),
}


def _train(setting: Setting) -> float:
    nothing = setting.out / "val.jsonl"
    nothing.touch()
    result = train(
        train_rows=str(setting.rows),
        val_rows=str(nothing),
        student=StudentConfig(model=str(setting.base)),
        train=TrainConfig(
            num_workers=setting.workers,
            num_train_epochs=setting.epochs,
            per_device_train_batch_size=setting.batch_size,
            max_length=MAX_LENGTH,
            bf16=True,
            save_strategy="no",
            **RECIPE,
        ),
        storage=str(setting.out),
        name="training",
        on_event=lambda event: None,
    )
    (setting.out / "model.txt").write_text(result.model_dir)
    return sum(result.tokens / epoch["tokens_per_s"] for epoch in result.history)


def _train_with_trl(python: Path, setting: Setting) -> float:
    settings = {
        **RECIPE,
        "base": str(setting.base),
        "rows": str(setting.rows),
        "out": str(setting.out),
        "workers": setting.workers,
        "threads": max(1, (os.cpu_count() or 1) // setting.workers),
        "batch_size": setting.batch_size,
        "epochs": setting.epochs,
    }
    file = setting.out / "settings.json"
    file.write_text(json.dumps(settings))
    script = ROOT / "benchmarks" / "_sft_with_trl.py"
    command = [python, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={setting.workers}", script, file]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-3000:]}")
    (setting.out / "model.txt").write_text(str(setting.out))
    return json.loads((setting.out / "result.json").read_text())["seconds"]


def _write_rows(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), "utf-8")


@torch.no_grad()
def _accuracy(out: Path, rows: list[Row]) -> float:
    folder = (out / "model.txt").read_text()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, tokenizer, torch.float32).eval()
    encoded, _ = encode([row.messages for row in rows], tokenizer, MAX_LENGTH)
    plan = plan_epoch(encoded.lengths, encoded.loss_weights(0.0), world_size=1, micro_batch_size=64)
    exact = 0.0
    for step in plan:
        batch = collate(encoded, step.micro_batches[0][0], 0.0, tokenizer.pad_token_id)
        exact += validate_batch(model, batch)[1].item()
    return exact / len(rows)


if __name__ == "__main__":
    main()
