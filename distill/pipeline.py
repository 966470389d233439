"""The line from examples to a student with a report.

    examples ── trace ──▶ traces ── make_rows ──▶ rows ── train ──▶ student ── evaluate ──▶ report

Each function is one stage: it goes on where an earlier run stopped, repeats no finished
work, and leaves what it made in the run directory. The work itself is in the modules that
they call.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill import cluster, export, imports, preflight, summary
from distill.config import SCRATCH, RunConfig
from distill.datasets import count_leaks, example_id
from distill.evaluation.evaluate import run_arm
from distill.evaluation.report import ExampleResult, build_report, render_html, summarise_arm
from distill.finetune import FineTuning, fine_tune
from distill.fingerprints import fingerprint
from distill.programs import program_fingerprint
from distill.progress import ProgressReporter
from distill.rows import Row, RowCounts, predictor_prompts, stream_rows
from distill.rundir import RunDir
from distill.runs import Run, student_job, teacher_job
from distill.selection import Selection
from distill.tracing.collect import collect
from serve import temporary
from serve.errors import TracingError, TrainingError


@dataclass(frozen=True)
class Rows:
    """The rows as files, and the sections of the report that tell how they came about."""

    train: str
    val: str
    fingerprint: str
    outputs: Sequence[str]
    spent_usd: float
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
    with cluster.connected(log_to_driver=True):
        train = preflight.fitted_workers(config.train)
        temporary.sweep()
        trace = preflight.fitted_actors(config.trace, config.teacher)
        preflight.check_cluster(train, trace, config.teacher)
        config = config.model_copy(update={"train": train, "trace": trace})
        directory.write_json("config.json", config.model_dump(mode="json"))
        yield Run(config, inputs, directory, progress)


def trace(run: Run) -> None:
    """Run the teacher over the trainset; every trace is durable in ``traces/``."""
    with run.progress.stage("trace") as stage, summary.timed(run.directory, "trace"):
        collect(teacher_job(run), summary.show_tracing(stage))


def make_rows(run: Run) -> Rows:
    """Render the traces that are good enough to learn from, as ``rows/*.jsonl``."""
    task, folding, config = run.inputs.task, run.inputs.folding, run.config.trace
    selection, counts = Selection(config, has_metric=task.metric is not None), RowCounts()
    job = teacher_job(run)
    spending = job.spending()
    render = functools.partial(
        stream_rows,
        prompts=predictor_prompts(task.program),
        adapter=task.adapter,
        counts=counts,
        folding=folding,
    )
    with run.progress.stage("rows") as stage:
        traced = render(selection.choose(job.traces(spending)))
        imported = imports.rows(config.imports, render, counts, folding)
        identity = _write_rows(run, itertools.chain(traced, imported), selection)
        stage.update(1, 1, summary.describe_rows(counts, selection))
    return Rows(
        train=run.directory.join("rows/train.jsonl"),
        val=run.directory.join("rows/val.jsonl"),
        fingerprint=identity,
        outputs=list(selection.outputs),
        spent_usd=spending.cost_usd,
        tracing=summary.tracing_section(run.directory, selection, spending.by_predictor),
        folding=summary.folding_section(folding, counts),
    )


def _write_rows(run: Run, rows: Iterable[Row], selection: Selection) -> str:
    """Write the rows as they come, and return what names them."""
    dev = {example_id(example) for example in run.inputs.dev}
    hashes = {"train": hashlib.sha256(), "val": hashlib.sha256()}
    written = Counter[str]()
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(run.directory.writing(f"rows/{name}.jsonl"))
            for name in hashes
        }
        for row in rows:
            name = "val" if row.example_id in dev else "train"
            line = json.dumps(row.to_json()) + "\n"
            files[name].write(line)
            hashes[name].update(line.encode())
            written[name] += 1
        if not selection.traces:
            raise TracingError("There are no traces yet. Run raydistill trace first.")
        if not written["train"]:
            raise TracingError(summary.no_rows(selection))
    return fingerprint({name: found.hexdigest() for name, found in hashes.items()})


def train(run: Run, rows: Rows) -> None:
    """Fine-tune the student on the rows; its best checkpoint becomes ``student/``."""
    fine_tune(_fine_tuning(run, rows), run.progress)


def evaluate(run: Run, rows: Rows) -> dict[str, Any]:
    """Compare teacher, base and student on the test set; leaves ``report.json`` and more."""
    config, inputs, directory = run.config, run.inputs, run.directory
    job = _fine_tuning(run, rows)
    if not job.is_done():
        raise TrainingError(
            f"{directory.join('student')}: is not the student of these traces and this "
            "configuration. Run raydistill train first."
        )
    training = summary.training_section(directory.read_json(f"{export.STUDENT}/{export.TRAINING}"))
    spent_usd = rows.spent_usd + sum(
        candidate["cost_usd"] for candidate in training.get("candidates", ())
    )
    report = build_report(
        arms=_run_arms(run, job.identity(), spent_usd),
        tracing=rows.tracing,
        training=training,
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


def _fine_tuning(run: Run, rows: Rows) -> FineTuning:
    config, task, folding = run.config, run.inputs.task, run.inputs.folding
    profile = export.make_profile(
        predictor_prompts(task.program),
        task.adapter,
        folding,
        state=export.program_state(task.program),
        program_path=config.program,
        setup=config.setup,
        fingerprint=program_fingerprint(task),
        inputs=config.data.inputs,
        outputs=rows.outputs,
    )
    return FineTuning(
        train_rows=rows.train,
        val_rows=rows.val,
        rows_fingerprint=rows.fingerprint,
        student=config.student,
        train=config.train,
        profile=profile,
        directory=run.directory,
        folder=export.STUDENT,
        score=functools.partial(_score_students, run, rows.spent_usd),
    )


def _score_students(
    run: Run, spent_usd: float, students: Sequence[tuple[str, str]]
) -> list[tuple[float, float]]:
    """What the program scores on the dev set with each of these students, and its cost in USD."""
    scores = []
    for number, (model, identity) in enumerate(students, start=1):
        job = student_job(run, model, identity, spent_usd, run.inputs.dev)
        job = dataclasses.replace(job, stage=f"score {number}/{len(students)}")
        spending = job.spending()
        with run.progress.stage(job.stage) as stage:
            results = run_arm(job, summary.show_tracing(stage), spending)
            score = summarise_arm(results, has_metric=True)["score"]
            stage.update(len(results), len(results), f"metric {score:.3f}")
        scores.append((score, spending.cost_usd))
        spent_usd += spending.cost_usd
    return scores


def _run_arms(run: Run, identity: str, spent_usd: float) -> dict[str, list[ExampleResult] | None]:
    config = run.config
    models: dict[str, tuple[str, Any]] = {"student": (run.directory.join("student"), identity)}
    if config.student.model != SCRATCH:
        models["base"] = (config.student.model, preflight.base_fingerprint(config.student.model))
    arms: dict[str, list[ExampleResult] | None] = {}
    for name in ("teacher", "base", "student"):
        if name == "teacher":
            job = teacher_job(run, run.inputs.test, spent_usd)
        elif name in models:
            job = student_job(run, *models[name], spent_usd, run.inputs.test)
        else:
            arms[name] = None
            continue
        job = dataclasses.replace(job, stage=f"evaluate {name}")
        spending = job.spending()
        with run.progress.stage(job.stage) as stage:
            arms[name] = run_arm(job, summary.show_tracing(stage), spending)
        spent_usd += spending.cost_usd
    return arms
