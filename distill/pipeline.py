"""The line from examples to a student with a report.

    examples ── trace ──▶ traces ── make_rows ──▶ rows ── train ──▶ student ── evaluate ──▶ report

Each function is one stage: it goes on where an earlier run stopped, repeats no finished
work, and leaves what it made in the run directory. The work itself is in the modules that
they call.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dspy

from distill import cluster, export, preflight, summary
from distill.config import RunConfig
from distill.datasets import count_leaks, example_id
from distill.evaluation.evaluate import for_student, run_arm, student_lm, teacher_lm
from distill.evaluation.report import ExampleResult, build_report, render_html
from distill.preflight import Inputs
from distill.programs import Task, fingerprint
from distill.progress import ProgressReporter
from distill.rows import count_rejections, keep, render_rows
from distill.rundir import RunDir
from distill.tracing.collect import Collection, LmSpec, collect
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from distill.tracing.trace import Trace
from distill.tracing.tracer import with_current_score
from serve.errors import TracingError


@dataclass(frozen=True)
class Run:
    """One run: what it was told, what it starts from, where it leaves things."""

    config: RunConfig
    inputs: Inputs
    directory: RunDir
    progress: ProgressReporter


@dataclass(frozen=True)
class Rows:
    """The rows as files, and the sections of the report that tell how they came about."""

    train: str
    val: str
    fingerprint: str
    outputs: Sequence[str]
    tracing: dict[str, Any]
    folding: dict[str, Any] | None


def run(config: RunConfig, progress: ProgressReporter) -> dict[str, Any]:
    """Walk the whole line; returns the report."""
    with opened(config, progress) as run:
        trace(run)
        rows = make_rows(run)
        train(run, rows)
        return evaluate(run, rows)


@contextlib.contextmanager
def opened(config: RunConfig, progress: ProgressReporter) -> Iterator[Run]:
    """Everything checked, Ray connected, the run directory there; nothing paid for yet."""
    with progress.stage("check") as stage:
        inputs = preflight.load(config)
        stage.update(1, 1, summary.describe_inputs(inputs))
    directory = RunDir(f"{config.storage}/{config.name}")
    directory.create()
    with cluster.connected():
        preflight.check_cluster(config)
        directory.write_json("config.json", config.model_dump(mode="json"))
        yield Run(config, inputs, directory, progress)


def trace(run: Run) -> None:
    """Run the teacher over the trainset; every trace is durable in ``traces/``."""
    with run.progress.stage("trace") as stage, summary.timed(run.directory, "trace"):
        collect(_teacher_job(run), summary.show_tracing(stage))


def make_rows(run: Run) -> Rows:
    """Render the traces that are good enough to learn from, as ``rows/*.jsonl``."""
    task, folding = run.inputs.task, run.inputs.folding
    with run.progress.stage("rows") as stage:
        traces = _traces(run)
        kept = keep(traces, run.config.trace, has_metric=task.metric is not None)
        rejected = count_rejections(traces, kept)
        rows, counts = render_rows(kept, task.program, task.adapter, folding)
        dev = {example_id(example) for example in run.inputs.dev}
        split = {
            "train": [row.to_json() for row in rows if row.example_id not in dev],
            "val": [row.to_json() for row in rows if row.example_id in dev],
        }
        if not split["train"]:
            raise TracingError(summary.no_rows(traces, rejected))
        for name, lines in split.items():
            run.directory.write_jsonl(f"rows/{name}.jsonl", lines)
        stage.update(1, 1, summary.describe_rows(len(rows), counts, rejected))
    return Rows(
        train=run.directory.join("rows/train.jsonl"),
        val=run.directory.join("rows/val.jsonl"),
        fingerprint=fingerprint(split),
        outputs=list(dict.fromkeys(name for trace in kept for name in trace.prediction or ())),
        tracing=summary.tracing_section(run.directory, traces, len(kept), rejected),
        folding=summary.folding_section(folding, counts),
    )


def train(run: Run, rows: Rows) -> None:
    """Fine-tune the student on the rows; its best checkpoint becomes ``student/``."""
    from distill.training.job import train as fine_tune

    config, directory = run.config, run.directory
    recipe = config.train.model_dump(exclude={"logging_steps", "use_gpu"})
    identity = fingerprint([rows.fingerprint, config.student.model_dump(), recipe])
    with run.progress.stage("train") as stage:
        if export.is_current(directory, identity):
            stage.update(1, 1, "the student is up to date")
            return
        result = fine_tune(
            train_rows=rows.train,
            val_rows=rows.val,
            student=config.student,
            train=config.train.model_copy(update={"use_gpu": preflight.use_gpu(config)}),
            storage=directory.join("checkpoints"),
            name=identity[:12],
            on_event=summary.show_training(stage, run.progress),
        )
        export.write_student(directory, config, run.inputs, rows.outputs, result, identity)
        directory.write_json("training.json", asdict(result))
        stage.update(1, 1, summary.describe_training(result))


def evaluate(run: Run, rows: Rows) -> dict[str, Any]:
    """Compare teacher, base and student on the test set; leaves ``report.json`` and more."""
    config, inputs, directory = run.config, run.inputs, run.directory
    report = build_report(
        arms=_run_arms(run, spent_usd=rows.tracing["cost_usd"] or 0.0),
        tracing=rows.tracing,
        training=summary.training_section(directory.read_json("training.json")),
        leakage={"test_in_train": count_leaks([*inputs.train, *inputs.dev], inputs.test)},
        run=summary.run_section(directory, config),
        folding=rows.folding,
    )
    from serve.app import serve_yaml

    export.add_scores(directory, report)
    directory.write_json("report.json", report)
    directory.write_text("report.html", render_html(report))
    directory.write_text("serve.yaml", serve_yaml(export.app_args(directory)))
    return report


def _run_arms(run: Run, spent_usd: float) -> dict[str, list[ExampleResult] | None]:
    config, test = run.config, run.inputs.test
    num_gpus = 1 if preflight.use_gpu(config) else 0
    student = student_lm(
        run.directory.join("student"), export.student_identity(run.directory), num_gpus
    )
    jobs: dict[str, Collection | None] = {
        "teacher": _teacher_job(run, test, spent_usd),
        "base": None,
        "student": _job(run, for_student(run.inputs.task), student, test, Limits()),
    }
    if config.student.model != "scratch":
        base = student_lm(config.student.model, config.student.model, num_gpus)
        jobs["base"] = _job(run, for_student(run.inputs.task), base, test, Limits())
    return {name: _run_arm(run, name, job) if job else None for name, job in jobs.items()}


def _run_arm(run: Run, name: str, job: Collection) -> list[ExampleResult]:
    with run.progress.stage(f"evaluate {name}") as stage:
        return run_arm(job, summary.show_tracing(stage))


def _teacher_job(
    run: Run, examples: Sequence[dspy.Example] | None = None, spent_usd: float = 0.0
) -> Collection:
    limits, budget_usd = run.config.trace, run.config.trace.budget_usd
    left_usd = None if budget_usd is None else budget_usd - spent_usd
    chosen = [*run.inputs.train, *run.inputs.dev] if examples is None else examples
    lm = teacher_lm(run.config.teacher.lm)
    return _job(run, run.inputs.task, lm, chosen, Limits(limits.max_failure_rate, left_usd))


def _job(
    run: Run, task: Task, lm: LmSpec, examples: Sequence[dspy.Example], limits: Limits
) -> Collection:
    store = TraceStore(run.directory.join("traces"))
    trace = run.config.trace
    return Collection(task, lm, examples, store, trace.actors, trace.concurrency, limits)


def _traces(run: Run) -> list[Trace]:
    """The traces of the trainset that the store holds, scored by the metric of today."""
    job = _teacher_job(run)
    keys = job.keys()
    found = job.store.latest(keys)
    if not found:
        raise TracingError("There are no traces yet. Run raydistill trace first.")
    return [
        with_current_score(found[key], example, job.task)
        for key, example in keys.items()
        if key in found
    ]
