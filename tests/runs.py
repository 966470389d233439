"""A small but whole run for tests: data files, a stand-in teacher, the real command line."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher

ROOT = Path(__file__).parent.parent
GOOD, BAD = ("sunny", "bright", "warm", "clear"), ("rainy", "grey", "cold", "foggy")
TINY = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def mood_of(text: str) -> str:
    """The truth of the tests' task."""
    return "good" if any(word in text for word in GOOD) else "bad"


class MoodTeacher(StandInTeacher):
    """Answers ``tests.programs``' predictors rightly, and remembers every text asked."""

    def __init__(self, latency_s: float = 0.0) -> None:
        super().__init__(self._reply, latency_s)
        self.asked: list[str] = []

    def _reply(self, messages: list[dict]) -> str:
        prompt = read_prompt(messages)
        text = prompt.inputs["text"]
        self.asked.append(text)
        known = {"mood": mood_of(text), "reply": f"It is {mood_of(text)}."}
        return prompt.reply({name: known[name] for name in prompt.outputs})


@dataclass
class RunFolder:
    """A folder with data and a configuration that ``raydistill`` can run."""

    path: Path
    api_base: str
    changes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.write_csv("train.csv", 60)
        self.write_csv("test.csv", 12, start=1000)
        config = {
            "name": "tiny",
            "program": "tests.programs:build",
            "metric": "tests.programs:right_mood",
            "data": {"train": "train.csv", "test": "test.csv", "inputs": ["text"]},
            "teacher": {
                "lm": {"model": "openai/stand-in", "api_base": self.api_base, "num_retries": 0}
            },
            "trace": {"concurrency": 4},
            "student": {"scratch": TINY},
            "train": {
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-2,
                "logging_steps": 1,
            },
        }
        for section, values in self.changes.items():
            old = config.get(section)
            config[section] = {**old, **values} if isinstance(old, dict) else values
        (self.path / "config.yaml").write_text(yaml.safe_dump(config))

    def write_csv(self, name: str, rows: int, start: int = 0) -> None:
        """Write texts that are all different, half of them good."""
        with (self.path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "mood"])
            for number in range(start, start + rows):
                words = GOOD if number % 2 else BAD
                text = f"day {number} was {words[number // 2 % 4]}"
                writer.writerow([text, mood_of(text)])

    @property
    def run_dir(self) -> Path:
        return self.path / "runs" / "tiny"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "distill.cli", *arguments]

    def raydistill(self, command: str, *overrides: str, timeout: float = 300):
        """Run a command to its end; returns the finished process with its output."""
        config = str(self.path / "config.yaml")
        return subprocess.run(
            self.command(command, config, *overrides),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    @contextmanager
    def started(self, command: str, *arguments: str) -> Iterator[subprocess.Popen]:
        """A command that runs meanwhile; killed on leaving if it has not ended."""
        process = subprocess.Popen(
            self.command(command, *arguments),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()

    def events(self) -> list[dict]:
        """What the run has recorded so far."""
        path = self.run_dir / "events.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def wait_for(self, predicate, process: subprocess.Popen, timeout: float = 120) -> None:
        """Wait until an event fulfils the predicate, or fail when the process ends first."""
        deadline = time.monotonic() + timeout
        while not any(predicate(event) for event in self.events()):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, f"waited in vain; events: {self.events()[-3:]}"
            time.sleep(0.05)


def environment() -> dict[str, str]:
    """A clean environment for a command: no cluster to join, and a key for the teacher."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "OPENAI_API_KEY": "not-a-key", "COLUMNS": "120"}
