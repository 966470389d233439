"""Runs the arms over the held-out examples: tracing with another LM, and a metric.

The student answers through the engine that will serve it. Arms leave traces in the run's
store, so an evaluation that was interrupted goes on where it stopped.
"""

import asyncio
import dataclasses
import functools
from typing import Any

import dspy

from distill import open_teacher
from distill.datasets import distinct, example_id
from distill.evaluation.report import ExampleResult
from distill.programs import Task
from distill.tracing.actor import LmSpec
from distill.tracing.collect import OnProgress, collect
from distill.tracing.collection import Collection
from distill.tracing.spending import Spending
from distill.tracing.trace import FailureKind, Trace
from serve.batcher import Batcher
from serve.dspy_lm import CONNECTION, student_adapter
from serve.dspy_lm import student_lm as answering_lm
from serve.models import load_engine


def teacher_lm(settings: dict[str, Any]) -> LmSpec:
    """The teacher: ``dspy.LM`` with the user's settings, or a model that the run serves itself.

    DSPy's own cache is off: the trace store is what keeps answers, and a cached answer
    would count as a call and lie about its latency. What only says how the model is reached
    names no other teacher, so a server that moved is not paid again.

    Raises:
        ConfigurationError: A model to be served is not there, or its settings are wrong.
    """
    if open_teacher.is_open(settings):
        return open_teacher.lm_spec(settings)
    names = {key: value for key, value in settings.items() if key not in CONNECTION}
    return LmSpec(
        make=functools.partial(dspy.LM, **{"cache": False, **settings}),
        identity={"teacher": names},
    )


def student_lm(model: str, identity: Any, num_gpus: float, teacher: LmSpec) -> LmSpec:
    """A student or base model, answering in the actor's own process.

    Args:
        model: A student directory, or a Hugging Face directory or id.
        identity: What names the model.
        num_gpus: GPUs of one actor; 0 runs it on one CPU.
        teacher: Judges, where the metric asks an LM: a student must not judge itself.
    """
    return LmSpec(
        make=functools.partial(_make_student_lm, model, num_threads=None if num_gpus else 1),
        identity={"student": identity},
        override_lms=True,
        judge=teacher.make,
        num_gpus=num_gpus,
    )


def run_arm(
    job: Collection, on_progress: OnProgress, spending: Spending | None = None
) -> list[ExampleResult]:
    """Answer every example of the job, and score the answers.

    Args:
        job: The arm.
        on_progress: As ``collect``'s.
        spending: Is added what the arm was paid.

    Returns:
        One result per example, in their order; equal examples share an answer.
    """
    collect(job, on_progress)
    examples = distinct(job.examples)
    results = {
        trace.example_id: _result(trace, examples[trace.example_id])
        for trace in job.traces(spending)
    }
    return [results[example_id(example)] for example in job.examples]


def for_student(task: Task) -> Task:
    """The task as a student runs it: without DSPy's second try in another format."""
    return dataclasses.replace(task, adapter=student_adapter(task.adapter))


def _make_student_lm(model: str, num_threads: int | None) -> dspy.BaseLM:
    batcher = Batcher(load_engine(model, num_threads))
    return answering_lm(batcher.complete, asyncio.get_running_loop())


def _result(trace: Trace, example: dspy.Example) -> ExampleResult:
    failure = trace.failure
    if failure is not None:
        status = "parse" if failure.kind is FailureKind.PARSE else "error"
    else:
        status = "error" if trace.score and trace.score.error else "ok"
    return ExampleResult(
        example_id=trace.example_id,
        score=trace.score.value if trace.score else None,
        status=status,  # type: ignore[arg-type]
        latency_ms=1000 * trace.latency_s,
        prompt_tokens=trace.usage.prompt_tokens,
        completion_tokens=trace.usage.completion_tokens,
        cost_usd=trace.usage.cost_usd,
        inputs=example.inputs().toDict(),
        expected=example.labels().toDict(),
        prediction=trace.prediction,
    )
