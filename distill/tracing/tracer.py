"""Runs a program on one example and returns the trace.

A plain class, without Ray: the actor around it is ``actor.TraceActor``. Whatever the
program, the LM or the metric raises is caught here and becomes data, once.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

from distill.datasets import example_id
from distill.programs import Task
from distill.secrets import scrubbed
from distill.tracing.conductor import CallSettings, Conductor
from distill.tracing.gate import Gate, OpenGate
from distill.tracing.held import govern, with_governed
from distill.tracing.trace import (
    METRIC,
    UNNAMED,
    Failure,
    FailureKind,
    PredictorCall,
    Score,
    Trace,
    Usage,
    total_usage,
)
from distill.tracing.values import as_shown, jsonable, revive_prediction
from distill.tracing.variants import Variant, check_told
from serve.dspy_lm import LmFailure, governed, is_lm_error, lm_failure
from serve.errors import CallPrevented
from serve.programs import as_prediction, runs_async
from serve.threads import allow_threads

MAX_MESSAGE_CHARS = 2_000
MAX_TRACE_STEPS = 1_000_000
RUN = "raydistill_run"
"""Key in DSPy's settings, which follow a program into its threads."""


@dataclass
class _Run:
    """What one run of the program leaves behind, filled while it runs."""

    settings: dict[str, Any]
    steps: list[Any] = field(default_factory=list)
    usages: list[tuple[str, Usage]] = field(default_factory=list)
    lm_errors: list[Exception] = field(default_factory=list)
    returned: Any = None
    prediction: dspy.Prediction | None = None
    error: Exception | None = None
    latency_s: float = 0.0
    scoring: bool = False

    def finish(self) -> None:
        """Take what the program returned, if the run was what it was meant to be."""
        prediction = as_prediction(self.returned)
        if self.steps:
            check_told(self.settings)
        self.prediction = prediction

    def failure(self) -> Failure | None:
        """Why the run is worth nothing."""
        # Whatever the program made of it: without the LM's answer it did not really run.
        prevented = [each for each in self.lm_errors if isinstance(each, CallPrevented)]
        error = prevented[0] if prevented else self.error
        return _failure(error, error in self.lm_errors) if error else None


class Tracer:
    """Runs a task's program on examples, many at a time.

    Args:
        task: Program, adapter and metric.
        lm: The LM that answers; predictors with an LM of their own keep it.
        concurrency: Examples in flight.
        override_lms: Put ``lm`` in the place of the predictors' own LMs as well; it is one of
            ours, whose calls nobody limits.
        judge: The LM that the metric may ask; None is ``lm``.
        gate: Lets the calls of all other LMs through; None lets all through.
        calls: How they are made.
    """

    def __init__(
        self,
        task: Task,
        lm: dspy.BaseLM,
        *,
        concurrency: int,
        override_lms: bool = False,
        judge: dspy.BaseLM | None = None,
        gate: Gate | None = None,
        calls: CallSettings | None = None,
    ) -> None:
        allow_threads()
        self._task = task
        conductor = Conductor(
            gate or OpenGate(), calls or CallSettings(), self._record, _record_error
        )
        ours = Conductor(OpenGate(), CallSettings(None, 0), self._record, _record_error)
        self._lm = governed(lm, ours if override_lms else conductor)
        self._judge = governed(judge, conductor) if judge else self._lm
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="program")
        self._metric = task.metric_identity
        named = task.program.named_predictors()
        for name, predictor in named:
            predictor.lm = None if override_lms else predictor.lm
            # Programs copy predictors as they run (retries, best of n), and a copy keeps its
            # stage; predictors made from one another would share theirs.
            predictor.stage = name
        self._names = {name for name, _ in named}
        modules = [module for _, module in task.program.named_sub_modules(dspy.Module)]
        govern((*modules, task.adapter), conductor)
        self._settings = with_governed(task.settings, conductor)

    async def trace(
        self,
        key: str,
        example: dspy.Example,
        variant: Variant = Variant(),  # noqa: B008
    ) -> Trace:
        """Run the program on one example.

        Never raises for what the program, the LM or the metric does.
        """
        run = _Run(variant.settings(example, self._task.adapter))
        if runs_async(self._task.program):
            await self._run_async(example, run)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, self._run_sync, example, run)
        score = await self._score(example, run)
        return Trace(
            key=key,
            example_id=example_id(example),
            calls=tuple(self._call(*step) for step in run.steps),
            prediction=jsonable(run.prediction.toDict()) if run.prediction is not None else None,
            usage=total_usage([usage for name, usage in run.usages if name != METRIC]),
            latency_s=run.latency_s,
            score=score,
            failure=run.failure(),
            usages=_by_name(run.usages),
            sample=variant.sample,
            hinted=variant.hinted,
        )

    @contextlib.contextmanager
    def _context(self, run: _Run) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with dspy.context(
                **self._settings,
                **run.settings,
                lm=self._lm,
                trace=run.steps,
                max_trace_size=MAX_TRACE_STEPS,
                **{RUN: run},
            ):
                yield
        except Exception as error:
            run.error = error
        finally:
            run.latency_s = time.perf_counter() - start

    def _run_sync(self, example: dspy.Example, run: _Run) -> None:
        with self._context(run):
            run.returned = self._task.program(**example.inputs())
            run.finish()

    async def _run_async(self, example: dspy.Example, run: _Run) -> None:
        with self._context(run):
            run.returned = await self._task.program.acall(**example.inputs())
            run.finish()

    async def _score(self, example: dspy.Example, run: _Run) -> Score | None:
        if self._metric is None or run.prediction is None:
            return None
        metric: Callable[..., Any] = self._task.metric  # type: ignore[assignment]

        def score() -> Score:
            # The metric may ask an LM of its own, but must not add steps to the trace.
            run.scoring, errors_before = True, len(run.lm_errors)
            with judging(self._settings, self._task, self._judge), dspy.context(**{RUN: run}):
                found = score_prediction(metric, self._metric or "", example, run.returned)
            if found.error and run.lm_errors[errors_before:]:
                # Not a bad answer: what the metric would say of it is not known.
                run.error = run.lm_errors[-1]
            return found

        return await asyncio.get_running_loop().run_in_executor(self._threads, score)

    def _call(self, predictor: Any, inputs: dict[str, Any], outputs: Any) -> PredictorCall:
        shown = as_shown(inputs, predictor.signature.input_fields)
        return PredictorCall(self._name(predictor), shown, jsonable(dict(outputs.items())))

    def _name(self, module: Any) -> str | None:
        stage = getattr(module, "stage", None)
        return stage if stage in self._names else None

    def _record(self, usage: Usage) -> None:
        run = dspy.settings.get(RUN)
        if run is None:
            return
        # DSPy sets caller_predict only while it streams; the modules under way it always knows.
        callers = reversed(dspy.settings.caller_modules or ())
        named = METRIC if run.scoring else next(filter(None, map(self._name, callers)), UNNAMED)
        run.usages.append((named, usage))


def judging(
    settings: Mapping[str, Any], task: Task, judge: dspy.BaseLM
) -> contextlib.AbstractContextManager[None]:
    """The settings that a metric finds."""
    manager: contextlib.AbstractContextManager[None] = dspy.context(
        **settings, lm=judge, adapter=task.adapter, trace=None
    )
    return manager


def score_prediction(
    metric: Callable[..., Any], identity: str, example: dspy.Example, prediction: Any
) -> Score:
    """Ask the metric; what it raises is kept with the score."""
    try:
        verdict = metric(example, prediction, None)
        # A metric may return dspy.Prediction(score=..., feedback=...).
        value = float(getattr(verdict, "score", verdict))
    except Exception as error:
        return Score(identity, None, _describe(error))
    if not math.isfinite(value):
        return Score(identity, None, f"the metric returned {value}")
    return Score(identity, value)


def is_scored(trace: Trace, task: Task) -> bool:
    """Whether the trace's score is by the task's metric as it is now, or there can be none."""
    return trace.prediction is None or task.metric_identity == (trace.score and trace.score.metric)


def with_current_score(
    trace: Trace, example: dspy.Example, task: Task, judge: dspy.BaseLM
) -> Trace:
    """The trace, scored anew if its score is not by the task's metric as it is now.

    A changed metric changes what is kept, not what the teacher said: the program is not run.
    """
    identity = task.metric_identity
    if trace.prediction is None or is_scored(trace, task):
        return trace
    if task.metric is None or identity is None:
        return dataclasses.replace(trace, score=None)
    prediction = revive_prediction(trace.prediction, task.program)
    with judging(task.settings, task, judge):
        score = score_prediction(task.metric, identity, example, prediction)
    return dataclasses.replace(trace, score=score)


def _record_error(error: Exception) -> None:
    run = dspy.settings.get(RUN)
    if run is not None:
        run.lm_errors.append(error)


def _by_name(usages: Sequence[tuple[str, Usage]]) -> dict[str, Usage]:
    names = dict.fromkeys(name for name, _ in usages)
    return {name: total_usage([usage for each, usage in usages if each == name]) for name in names}


def _failure(error: Exception, is_lms: bool) -> Failure:
    if isinstance(error, CallPrevented):
        return Failure(FailureKind.PREVENTED, error.stop, _describe(error))
    unanswered = is_lms and lm_failure(error) is not LmFailure.OTHER
    if isinstance(error, AdapterParseError):
        kind = FailureKind.PARSE
    elif unanswered or is_lm_error(error):
        kind = FailureKind.TEACHER
    else:
        kind = FailureKind.PROGRAM
    return Failure(kind, type(error).__name__, _describe(error))


def _describe(error: BaseException) -> str:
    # Providers quote the key that they were sent, or a URL that holds it.
    return scrubbed(f"{error}")[:MAX_MESSAGE_CHARS] or type(error).__name__
