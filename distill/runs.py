"""One run, and who answers which examples in it, within which limits.

What is asked for when is for ``pipeline``; asking is for ``tracing.collect``.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from distill import open_teacher, preflight
from distill.config import RunConfig
from distill.evaluation.evaluate import for_student, student_lm, teacher_lm
from distill.preflight import Inputs
from distill.programs import Task
from distill.progress import ProgressReporter
from distill.rundir import RunDir
from distill.tracing.actor import LmSpec
from distill.tracing.collection import Collection
from distill.tracing.conductor import CallSettings
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from serve.cluster import capacity


@dataclass(frozen=True)
class Run:
    """One run: what it was told, what it starts from, where it leaves things."""

    config: RunConfig
    inputs: Inputs
    directory: RunDir
    progress: ProgressReporter


def teacher_job(
    run: Run, examples: Sequence[dspy.Example] | None = None, spent_usd: float = 0.0
) -> Collection:
    """The teacher's part: over the examples to learn from, or once over others.

    Args:
        run: The run.
        examples: None is those to train and to validate on, with their samples and hints.
        spent_usd: What the run has spent before.
    """
    trace, task = run.config.trace, run.inputs.task
    limits, lm = Limits.of(trace, spent_usd), teacher_lm(run.config.teacher.lm)
    if examples is not None:
        return _job(run, task, lm, examples, limits)
    job = _job(run, task, lm, [*run.inputs.train, *run.inputs.dev], limits)
    threshold = None if trace.keep == "all" else trace.metric_threshold
    return dataclasses.replace(job, samples=trace.samples, hints=trace.hints, threshold=threshold)


def student_job(
    run: Run,
    model: str,
    identity: Any,
    spent_usd: float,
    examples: Sequence[dspy.Example],
) -> Collection:
    """A model's part in the teacher's place, once over examples.

    Args:
        run: The run.
        model: A student directory, or a Hugging Face directory or id.
        identity: Names the model among the traces.
        spent_usd: What the run has spent before.
        examples: Those to answer.
    """
    config = run.config
    num_gpus = 1 if preflight.use_gpu(config.train) else 0
    lm = student_lm(model, identity, num_gpus, teacher_lm(config.teacher.lm))
    # Its own calls cost nothing, and may fail; its metric's are a teacher's.
    limits = dataclasses.replace(Limits.of(config.trace, spent_usd), max_failure_rate=1.0)
    return _job(run, for_student(run.inputs.task), lm, examples, limits)


def _job(
    run: Run, task: Task, lm: LmSpec, examples: Sequence[dspy.Example], limits: Limits
) -> Collection:
    store = TraceStore(run.directory.join("traces"))
    trace = run.config.trace
    smallest, largest = trace.min_actors, trace.max_actors
    if lm.num_gpus:
        # More actors than GPUs would wait for one for ever, and their examples with them.
        largest = min(largest, int(capacity("GPU") / lm.num_gpus))
        smallest = min(smallest, largest)
    return Collection(
        task=task,
        lm=lm,
        examples=examples,
        store=store,
        actors=smallest,
        max_actors=largest,
        concurrency=trace.concurrency,
        limits=limits,
        calls=CallSettings.of(trace),
        run=run.config.name,
        service=open_teacher.service(run.config.teacher, run.progress.note),
    )
