"""Banking77 from end to end: all 77 intents, 10,003 queries traced, 3,080 held out.

    python -m benchmarks.banking77 --data DIR [--out FILE] [key.path=value ...]

DIR holds train.csv, test.csv and teacher_answers.csv (see examples/banking77). Starts the
stand-in teacher that replays the recorded answers, runs ``raydistill run`` as a user would,
in a folder of its own, and writes what the report and the clock say as JSON. Overrides go to
``raydistill run``, for comparing settings.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from examples.banking77.recorded_teacher import make_answer, read_recording
from examples.standin_teacher import StandInTeacher, serve_in_background

ROOT = Path(__file__).parent.parent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark the whole line on Banking77.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "banking77.json")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="of the stand-in teacher")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()
    teacher = StandInTeacher(make_answer(read_recording(args.data)), args.latency_ms / 1000)
    with serve_in_background(teacher) as server, tempfile.TemporaryDirectory() as storage:
        start = time.perf_counter()
        _run(args.data, server.api_base, storage, args.overrides)
        seconds = time.perf_counter() - start
        figures = _figures(Path(storage) / "banking77", seconds, teacher.calls)
    figures["overrides"] = args.overrides
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _run(data: Path, api_base: str, storage: str, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "distill.cli", "run", "examples/banking77/config.yaml"]
    command += [f"data.train={data / 'train.csv'}", f"data.test={data / 'test.csv'}"]
    command += [f"teacher.lm.api_base={api_base}", f"storage={storage}", *overrides]
    # The run is a process of its own so that the teacher's work is not counted in its start.
    environment = {**os.environ, "OPENAI_API_KEY": "not-a-key"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def _figures(run_dir: Path, seconds: float, calls: int) -> dict[str, Any]:
    report = json.loads((run_dir / "report.json").read_text())
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    stages = {e["stage"]: e["seconds"] for e in events if e["event"] == "stage_end"}
    return {
        "teacher": report["arms"]["teacher"],
        "student": report["arms"]["student"],
        "comparison": report["comparison"],
        "training": report["training"],
        "seconds": round(seconds, 1),
        "stage_seconds": stages,
        "teacher_calls": calls,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": report["run"]["versions"],
    }


if __name__ == "__main__":
    main()
