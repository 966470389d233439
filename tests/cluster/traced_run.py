"""A run for the tests: traces texts on a cluster, and says who is at it.

python traced_run.py ADDRESS API_BASE FOLDER COUNT ACTORS
"""

import os
import sys
from pathlib import Path

import dspy
import ray

from distill.evaluation.evaluate import teacher_lm
from distill.programs import Task
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from tests.programs import Sentiment


class Signing(dspy.Module):
    """Leaves the name of its process where the test finds it."""

    def __init__(self, folder):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)
        self.folder = folder

    def forward(self, text):
        Path(self.folder, f"{os.getpid()}.pid").touch()
        return self.judge(text=text)


def make_job(api_base: str, folder: str, count: int, actors: int = 2) -> Collection:
    """Two actors at most, 32 calls in flight."""
    settings = {"model": "openai/stand-in", "api_base": api_base, "num_retries": 0}
    return Collection(
        task=Task(Signing(folder), dspy.ChatAdapter(), None),
        lm=teacher_lm(settings),
        examples=[dspy.Example(text=f"sunny {n}").with_inputs("text") for n in range(count)],
        store=TraceStore(f"{folder}/traces"),
        actors=actors,
        max_actors=2,
        concurrency=16,
        limits=Limits(max_failure_rate=0.01),
    )


if __name__ == "__main__":
    address, api_base, folder, count, actors = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    collect(make_job(api_base, folder, int(count), int(actors)), lambda *_: None)
