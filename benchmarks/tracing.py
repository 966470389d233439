"""Tracing against DSPy's own: a slow teacher, an instant one, and a hundred times the examples.

    python -m benchmarks.tracing [--out FILE] [--examples 2000 200000]

Slow: a stand-in teacher that takes two seconds an answer, 400 calls in flight, against
``dspy.BootstrapFinetune`` at its best number of threads; the rate is the teacher's own, over
the middle of its answers. Instant: an LM in the actors' own processes. Each
measurement is a process of its own, so that its peak of resident memory is its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import dspy
import ray
from starlette.requests import Request
from starlette.responses import JSONResponse

from distill import summary
from distill.evaluation.evaluate import teacher_lm
from distill.programs import Task
from distill.tracing.actor import LmSpec
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, serve_forever

ROOT = Path(__file__).parent.parent
LATENCY_S = 2.0
IN_FLIGHT = 400
SLOW_EXAMPLES = 6_000
DSPYS_EXAMPLES = 1_500
DSPYS_THREADS = {"slow": (100, 400), "instant": (1, 8)}


class Mood(dspy.Signature):
    """Judge the mood of a text."""

    text: str = dspy.InputField()
    mood: str = dspy.OutputField()


class Instant(dspy.LM):
    """Answers at once, in this process."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """The same answer to everything."""
        reply = read_prompt(messages).reply({"mood": "good"})
        message = {"role": "assistant", "content": reply}
        import litellm

        return litellm.ModelResponse(
            model=self.model,
            choices=[{"index": 0, "finish_reason": "stop", "message": message}],
            usage={"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        )


class Timed(StandInTeacher):
    """A teacher that knows how fast it answered, start and end left out."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answered: list[float] = []

    async def _complete(self, request: Request) -> JSONResponse:
        response = await super()._complete(request)
        self._answered.append(time.monotonic())
        return response

    async def _stats(self, request: Request) -> JSONResponse:
        fifth = len(self._answered) // 5
        middle = self._answered[fifth:-fifth]
        rate = (len(middle) - 1) / (middle[-1] - middle[0])
        return JSONResponse({"calls": self.calls, "calls_per_s": rate})


def examples(count: int) -> list[dspy.Example]:
    """Texts that are all different."""
    return [dspy.Example(text=f"day {n} was sunny").with_inputs("text") for n in range(count)]


def ours(lm: LmSpec, count: int, actors: int, concurrency: int) -> dict[str, float]:
    """Trace, and say how fast, and how much memory the driver had before and at its peak."""
    ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False)
    trainset = examples(count)
    task = Task(dspy.Predict(Mood), dspy.ChatAdapter(), None)
    times: list[tuple[float, int]] = []

    def on_progress(counts: Any, calls: int, total: int) -> None:
        if calls:
            times[1:] = [(time.monotonic(), calls)]
            times[:1] = times[:1] or [(time.monotonic(), calls)]

    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore(folder)
        job = Collection(task, lm, trainset, store, actors, concurrency, Limits())
        before = _resident_mb()
        collect(job, on_progress)
        start = time.monotonic()
        assert sum(1 for _ in job.traces()) == count
        read_s = time.monotonic() - start
    ray.shutdown()
    (first_time, first_calls), (last_time, last_calls) = times[0], times[-1]
    return {
        "calls_per_s": (last_calls - first_calls) / (last_time - first_time),
        "resident_mb_before": before,
        "resident_mb_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "read_s": read_s,
    }


def dspys(lm: dspy.LM, count: int, threads: int) -> dict[str, float]:
    """Have DSPy's own class trace, and say how fast."""

    class TracingOnly(dspy.BootstrapFinetune):
        @staticmethod
        def finetune_lms(finetune_dict: Any) -> Any:
            return {key: job["lm"] for key, job in finetune_dict.items()}

    program = dspy.Predict(Mood)
    program.set_lm(lm)
    optimizer = TracingOnly(num_threads=threads)
    start = time.monotonic()
    optimizer.compile(program, trainset=examples(count))
    return {"calls_per_s": count / (time.monotonic() - start), "threads": threads}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _slow(who: str, threads: int) -> dict[str, float]:
    """One side's rate with the slow teacher, as the teacher saw it."""
    command = [sys.executable, "-m", "benchmarks.tracing", "--side", "teacher"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as teacher:
        try:
            assert teacher.stdout is not None
            url = json.loads(teacher.stdout.readline())["url"]
            found = _side(who, url=url, threads=threads)
            with urllib.request.urlopen(f"{url}/stats") as response:
                stats = json.load(response)
        finally:
            teacher.terminate()
    return {**found, "calls_per_s": stats["calls_per_s"]}


def _side(who: str, **arguments: Any) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    options = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-m", "benchmarks.tracing", "--side", who, *options]
    environment = {**os.environ, "OPENAI_API_KEY": "none", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(who, arguments, found, file=sys.stderr)
    return found


def _run_side(args: argparse.Namespace) -> None:
    settings = {"model": "openai/stand-in", "cache": False, "num_retries": 0, "timeout": 60}
    if args.side == "teacher":
        mood = {"mood": "good"}
        serve_forever(Timed(lambda messages: read_prompt(messages).reply(mood), LATENCY_S))
        return
    slow = {**settings, "api_base": f"{args.url}/v1"}
    cores = os.cpu_count() or 1
    found = {
        "ours-slow": lambda: ours(teacher_lm(slow), SLOW_EXAMPLES, 4, IN_FLIGHT // 4),
        "ours-instant": lambda: ours(
            LmSpec(lambda: Instant("instant", cache=False), "instant"), args.count, cores, 32
        ),
        "dspy-slow": lambda: dspys(dspy.LM(**slow), DSPYS_EXAMPLES, args.threads),
        "dspy-instant": lambda: dspys(Instant("instant", cache=False), args.count, args.threads),
    }[args.side]()
    print(json.dumps(found))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark tracing.")
    parser.add_argument("--data", help="not needed; every benchmark is given it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "tracing.json")
    parser.add_argument("--examples", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=2_000, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        _run_side(args)
        return
    figures: dict[str, Any] = {
        "slow": {
            "possible_calls_per_s": IN_FLIGHT / LATENCY_S,
            "raydistill": _slow("ours-slow", 0),
            "dspy": [_slow("dspy-slow", threads) for threads in DSPYS_THREADS["slow"]],
        },
        "instant": {
            "raydistill": {n: _side("ours-instant", count=n) for n in args.examples},
            "dspy": [_side("dspy-instant", threads=n) for n in DSPYS_THREADS["instant"]],
        },
    }
    for side in figures.values():
        mine = side["raydistill"]
        rate = mine.get("calls_per_s") or mine[args.examples[0]]["calls_per_s"]
        best = max(found["calls_per_s"] for found in side["dspy"])
        side["ratio"] = round(rate / best, 2)
    figures |= {"cores": os.cpu_count(), "versions": summary.versions()}
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
