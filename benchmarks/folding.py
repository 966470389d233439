"""What folding saves: the same student trained and asked with folded and with full prompts.

    python -m benchmarks.folding --data DIR [--out FILE]

DIR holds Banking77's train.csv, test.csv and teacher_answers.csv. Both ways go through the
same training loop and the same engine, on as many rows and requests as finish in a minute or
so; full prompts get fewer of them, since rates are what is compared.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray

from benchmarks._rows import make_rows, prompts
from distill import summary
from distill.config import StudentConfig, TrainConfig
from distill.rundir import RunDir
from distill.training.job import train
from serve.engines.base import ChatRequest
from serve.engines.transformers import TransformersEngine
from serve.files import local_folder
from serve.folding import Folding
from serve.student import Manifest

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 16
BATCH = 32


@dataclass(frozen=True)
class Side:
    """One of the two ways, and how much of it is run."""

    name: str
    num_rows: int
    num_requests: int
    batch_size: int


SIDES = [Side("folded", 4096, 1024, 32), Side("full", 256, 96, 4)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark folded against full prompts.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "folding.json")
    args = parser.parse_args()
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as storage:
            figures: dict[str, Any] = {
                side.name: _measure(side, args.data, RunDir(f"{storage}/{side.name}"))
                for side in SIDES
            }
    finally:
        ray.shutdown()
    folded, full = figures["folded"], figures["full"]
    figures["ratio"] = {
        key: round(folded[key] / full[key], 1) for key in ("rows_per_s", "requests_per_s")
    }
    figures |= {"cores": os.cpu_count(), "versions": summary.versions()}
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _measure(side: Side, data: Path, directory: RunDir) -> dict[str, float]:
    rows, folding = make_rows(data, folded=side.name == "folded")
    directory.create()
    directory.write_jsonl("train.jsonl", [row.to_json() for row in rows[: side.num_rows]])
    directory.write_text("val.jsonl", "")
    result = train(
        train_rows=directory.join("train.jsonl"),
        val_rows=directory.join("val.jsonl"),
        student=StudentConfig(),
        train=TrainConfig(
            num_train_epochs=1, per_device_train_batch_size=side.batch_size, learning_rate=1e-3
        ),
        storage=directory.join("checkpoints"),
        name="run",
        on_event=lambda event: None,
    )
    with local_folder(result.model_dir) as folder:
        _write_manifest(folder, folding)
        requests_per_s, prompt_tokens = _ask(folder, prompts(data, side.num_requests))
    return {
        "rows_per_s": round(result.rows / result.seconds, 2),
        "tokens_per_row": round(result.tokens / result.rows, 1),
        "requests_per_s": round(requests_per_s, 2),
        "prompt_tokens": round(prompt_tokens, 1),
    }


def _write_manifest(folder: Path, folding: Folding | None) -> None:
    Manifest(
        program="examples.banking77.program:build",
        inputs=["text"],
        outputs=["category"],
        predictors={},
        adapter="dspy.adapters.chat_adapter.ChatAdapter",
        base_model="scratch",
        folding=folding.to_json() if folding else None,
        max_new_tokens=NEW_TOKENS,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    ).save(folder)


def _ask(folder: Path, prompts: list[Any]) -> tuple[float, float]:
    """Requests a second in full batches, and prompt tokens of a request."""
    engine = TransformersEngine(folder, num_threads=os.cpu_count())
    requests = [ChatRequest(messages=messages) for messages in prompts]
    engine.generate(requests[:BATCH])
    start = time.perf_counter()
    results = [
        result
        for first in range(0, len(requests), BATCH)
        for result in engine.generate(requests[first : first + BATCH])
    ]
    seconds = time.perf_counter() - start
    return len(results) / seconds, sum(r.prompt_tokens for r in results) / len(results)


if __name__ == "__main__":
    main()
