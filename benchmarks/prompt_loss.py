"""What the loss on the prompt's tokens is worth to a student trained from scratch.

    python -m benchmarks.prompt_loss --data DIR [--epochs N] [--out FILE]

DIR holds Banking77's train.csv, test.csv and teacher_answers.csv. The same student is
trained on 10,000 rows with different ``train.prompt_loss_weight``; what is compared is the
share of 1,000 held-out rows whose answer it then gives exactly.
"""

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import ray

from benchmarks._rows import make_rows
from distill import summary
from distill.config import StudentConfig, TrainConfig
from distill.rundir import RunDir
from distill.training.job import train

ROOT = Path(__file__).parent.parent
WEIGHTS = (0.0, 0.3, 1.0)
NUM_ROWS, NUM_HELD_OUT = 10_000, 1_000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare weights of the prompt in the loss.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "prompt_loss.json")
    args = parser.parse_args()
    rows = [row.to_json() for row in make_rows(args.data, folded=True)[0]]
    random.Random(0).shuffle(rows)
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as storage:
            directory = RunDir(storage)
            directory.write_jsonl("train.jsonl", rows[:NUM_ROWS])
            directory.write_jsonl("val.jsonl", rows[NUM_ROWS:][:NUM_HELD_OUT])
            exact = {str(weight): _train(weight, args.epochs, directory) for weight in WEIGHTS}
    finally:
        ray.shutdown()
    figures = {"epochs": args.epochs, "exact_by_epoch": exact, "versions": summary.versions()}
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _train(weight: float, epochs: int, directory: RunDir) -> list[Any]:
    result = train(
        train_rows=directory.join("train.jsonl"),
        val_rows=directory.join("val.jsonl"),
        student=StudentConfig(),
        train=TrainConfig(
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            weight_decay=0.1,
            prompt_loss_weight=weight,
        ),
        storage=directory.join("checkpoints"),
        name=f"weight-{weight}",
        on_event=lambda event: None,
    )
    return [epoch["val_exact"] for epoch in result.history]


if __name__ == "__main__":
    main()
