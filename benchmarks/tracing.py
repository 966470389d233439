"""Tracing against DSPy's own: a slow teacher, an instant one, and a hundred times the examples.

    python -m benchmarks.tracing [--out FILE] [--examples 2000 200000] [--slow-examples 6000 1500]

Slow: a stand-in teacher that takes two seconds an answer, 400 calls in flight, against
``dspy.BootstrapFinetune`` at its best number of threads; the rate is the teacher's own, over
the middle of its answers. Instant: an LM in the processes that trace; the rate is from the
first of the answers to the last. ``calls_per_s`` so leaves the start of either side out;
``seconds`` is all that a caller waits for, the start of tracing actors among it. Each
measurement is a process of its own, so that its peak of resident memory is its own. Whatever
else the machine does is counted in ``cores_busy``: ``load_before`` tells whether it was idle.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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
DSPYS_THREADS = {"slow": (100, 200, 400), "instant": (1, 2, 8)}


class Mood(dspy.Signature):
    """Judge the mood of a text."""

    text: str = dspy.InputField()
    mood: str = dspy.OutputField()


class Instant(dspy.LM):
    """Answers at once, in this process."""

    answered: ClassVar[list[float]] = []
    """When, by all of them in this process."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """The same answer to everything."""
        # Not at the top, which every process of the benchmark would wait for.
        import litellm

        self.answered.append(time.monotonic())
        reply = read_prompt(messages).reply({"mood": "good"})
        message = {"role": "assistant", "content": reply}
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
        before, clock = _memory_mb("VmRSS"), _Clock()
        collect(job, on_progress)
        waited = clock.read()
        clock = _Clock()
        assert sum(1 for _ in job.traces()) == count
        read_s = clock.read()["seconds"]
    ray.shutdown()
    (first_time, first_calls), (last_time, last_calls) = times[0], times[-1]
    return {
        "calls_per_s": (last_calls - first_calls) / (last_time - first_time),
        **waited,
        "resident_mb_before": before,
        "resident_mb_peak": _memory_mb("VmHWM"),
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
    trainset, before, clock = examples(count), _memory_mb("VmRSS"), _Clock()
    optimizer.compile(program, trainset=trainset)
    times = Instant.answered
    return {
        "threads": threads,
        # Of a teacher in another process, that one knows.
        "calls_per_s": (len(times) - 1) / (times[-1] - times[0]) if times else 0.0,
        **clock.read(),
        "resident_mb_before": before,
        "resident_mb_peak": _memory_mb("VmHWM"),
    }


class _Clock:
    """Tells seconds from now on, and how many of the machine's cores were busy."""

    def __init__(self) -> None:
        self._start, self._busy = time.monotonic(), _busy_s()

    def read(self) -> dict[str, float]:
        """Since the start."""
        seconds = time.monotonic() - self._start
        return {"seconds": seconds, "cores_busy": (_busy_s() - self._busy) / seconds}


def _busy_s() -> float:
    """Seconds of all cores in user, nice and system time since the machine started."""
    ticks = Path("/proc/stat").read_text().split()[1:4]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _memory_mb(name: str) -> float:
    """This process's resident memory: ``VmRSS`` is now, ``VmHWM`` the most there has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith(name)]
    return int(kilobytes) / 1024


def _slow(who: str, count: int, threads: int) -> dict[str, float]:
    """One side's rate with the slow teacher, as the teacher saw it."""
    command = [sys.executable, "-m", "benchmarks.tracing", "--side", "teacher"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as teacher:
        try:
            assert teacher.stdout is not None
            url = json.loads(teacher.stdout.readline())["url"]
            found = _side(who, url=url, count=count, threads=threads)
            with urllib.request.urlopen(f"{url}/stats") as response:
                stats = json.load(response)
        finally:
            teacher.terminate()
    return {**found, "calls_per_s": stats["calls_per_s"]}


def _side(who: str, **arguments: Any) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    options = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-m", "benchmarks.tracing", "--side", who, *options]
    settings = {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment = {**os.environ, **settings, "RAY_AUTH_MODE": "disabled"}
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
        "ours-slow": lambda: ours(teacher_lm(slow), args.count, 4, IN_FLIGHT // 4),
        "ours-instant": lambda: ours(
            LmSpec(lambda: Instant("instant", cache=False), "instant"), args.count, cores, 32
        ),
        "dspy-slow": lambda: dspys(dspy.LM(**slow), args.count, args.threads),
        "dspy-instant": lambda: dspys(Instant("instant", cache=False), args.count, args.threads),
    }[args.side]()
    print(json.dumps(found))


def _measure_slow(count: int, dspys_count: int) -> dict[str, Any]:
    possible = IN_FLIGHT / LATENCY_S
    mine = _slow("ours-slow", count, 0)
    theirs = [_slow("dspy-slow", dspys_count, threads) for threads in DSPYS_THREADS["slow"]]
    return {
        "possible_calls_per_s": possible,
        "raydistill": mine,
        "dspy": theirs,
        "share_of_possible": round(mine["calls_per_s"] / possible, 3),
        "ratio": _ratio(mine, theirs),
    }


def _measure_instant(counts: Sequence[int]) -> dict[str, Any]:
    mine = {count: _side("ours-instant", count=count) for count in counts}
    threads = DSPYS_THREADS["instant"]
    theirs = [_side("dspy-instant", count=counts[0], threads=number) for number in threads]
    return {"raydistill": mine, "dspy": theirs, "ratio": _ratio(mine[counts[0]], theirs)}


def _ratio(mine: Mapping[str, float], theirs: Sequence[Mapping[str, float]]) -> float:
    """To DSPy at its best."""
    return round(mine["calls_per_s"] / max(found["calls_per_s"] for found in theirs), 2)


def _about() -> dict[str, Any]:
    return {
        "command": " ".join(["python -m benchmarks.tracing", *sys.argv[1:]]),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": summary.versions(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark tracing.")
    parser.add_argument("--data", help="not needed; every benchmark is given it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "tracing.json")
    parser.add_argument("--examples", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--slow-examples", type=int, nargs=2, default=[6_000, 1_500])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=2_000, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        _run_side(args)
        return
    figures = _about() | {"slow": _measure_slow(*args.slow_examples)}
    figures["instant"] = _measure_instant(args.examples)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
