"""Runs the arms over the held-out examples: tracing with another LM, and a metric.

The student answers through the engine that will serve it. Arms leave traces in the run's
store, so an evaluation that was interrupted goes on where it stopped.
"""

import asyncio
import dataclasses
import functools
from typing import Any

import dspy

from distill.datasets import example_id
from distill.evaluation.report import ExampleResult
from distill.programs import Task
from distill.tracing.collect import Collection, LmSpec, OnProgress, collect
from distill.tracing.conductor import Conductor
from distill.tracing.governor import gate_to, governing
from distill.tracing.spending import cost_usd, paid_by_predictor
from distill.tracing.trace import FailureKind, Trace, Usage
from distill.tracing.tracer import has_current_score, with_current_score
from serve.batcher import Batcher
from serve.dspy_lm import CONNECTION, governed, student_adapter
from serve.dspy_lm import student_lm as answering_lm
from serve.errors import BudgetExceeded, BudgetSpent, CallPrevented, TracingError
from serve.models import load_engine


def teacher_lm(settings: dict[str, Any]) -> LmSpec:
    """The teacher: ``dspy.LM`` with the user's settings.

    DSPy's own cache is off: the trace store is what keeps answers, and a cached answer
    would count as a call and lie about its latency. What only says how the model is reached
    names no other teacher, so a server that moved is not paid again.
    """
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


def run_arm(job: Collection, on_progress: OnProgress) -> list[ExampleResult]:
    """Answer every example of the job, and score the answers.

    Returns:
        One result per example, in their order; equal examples share an answer.
    """
    collect(job, on_progress)
    traces = scored_traces(job)
    by_id = {trace.example_id: trace for trace in traces}
    return [_result(by_id[example_id(example)], example) for example in job.examples]


def scored_traces(job: Collection) -> list[Trace]:
    """The traces that the store holds for a job, scored by its metric as it is now.

    Raises:
        BudgetExceeded, TracingError: The metric asks an LM, and may not.
    """
    keys = job.keys()
    found = job.store.latest(keys)
    pairs = [(found[key], example) for key, example in keys.items() if key in found]
    if all(has_current_score(trace, job.task) for trace, _ in pairs):
        return [trace for trace, _ in pairs]
    spent_usd = cost_usd(paid_by_job(job))
    failed: list[Exception] = []
    with governing(job.store.uri, job.limits.bounds(spent_usd)) as governor:
        conductor = Conductor(gate_to(governor), job.calls, lambda _: None, failed.append)
        judge = governed((job.lm.judge or job.lm.make)(), conductor)
        traces = [with_current_score(trace, example, job.task, judge) for trace, example in pairs]
    for error in failed:
        # Not a bad score: what the metric would have said is not known.
        if isinstance(error, BudgetSpent):
            raise BudgetExceeded(f"The metric asks an LM: {error}") from error
        if isinstance(error, CallPrevented):
            raise TracingError(f"The metric asks an LM: {error}") from error
    return traces


def paid_by_job(job: Collection) -> dict[str, Usage]:
    """What a job has paid for, by predictor: first tries that were replaced as well."""
    keys = job.keys()
    records = (trace for trace in job.store.scan() if trace.key in keys)
    return paid_by_predictor(records, job.lm.override_lms)


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
