"""Runs a program on one example and returns the trace.

A plain class, without Ray: the actor around it is ``collect.TraceActor``. Whatever the
program, the LM or the metric raises is caught here and becomes data, once.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

from distill.datasets import example_id
from distill.programs import Task
from distill.tracing.trace import (
    Failure,
    FailureKind,
    PredictorCall,
    Score,
    Trace,
    Usage,
    total_usage,
)
from distill.tracing.values import as_shown, jsonable, revive_prediction
from serve.dspy_lm import call_usage, is_lm_error, metered
from serve.programs import allow_threads, as_prediction, runs_async

MAX_MESSAGE_CHARS = 2_000
MAX_TRACE_STEPS = 1_000_000
ENTRIES = "raydistill_entries"
"""Key in DSPy's settings, which follow a program into its threads."""


@dataclass
class _Run:
    """What one run of the program leaves behind, filled while it runs."""

    steps: list[Any]
    entries: list[dict[str, Any]]
    returned: Any = None
    prediction: dspy.Prediction | None = None
    error: Exception | None = None
    latency_s: float = 0.0


class Tracer:
    """Runs a task's program on examples, many at a time.

    Args:
        task: Program, adapter and metric.
        lm: The LM that answers; predictors with an LM of their own keep it.
        concurrency: Examples in flight.
        override_lms: Put ``lm`` in the place of the predictors' own LMs as well.
        judge: The LM that the metric may ask; None is ``lm``.
    """

    def __init__(
        self,
        task: Task,
        lm: dspy.BaseLM,
        *,
        concurrency: int,
        override_lms: bool = False,
        judge: dspy.BaseLM | None = None,
    ) -> None:
        allow_threads()
        self._task = task
        self._lm = metered(lm, _record)
        self._judge = judge or lm
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="program")
        self._metric = task.metric_identity
        named = task.program.named_predictors()
        for name, predictor in named:
            own = None if override_lms else predictor.lm
            predictor.lm = metered(own, _record) if own else None
            # Programs copy predictors as they run (retries, best of n), and a copy keeps its
            # stage; predictors made from one another would share theirs.
            predictor.stage = name
        self._names = {name for name, _ in named}

    async def trace(self, key: str, example: dspy.Example) -> Trace:
        """Run the program on one example.

        Never raises for what the program, the LM or the metric does.
        """
        run = _Run(steps=[], entries=[])
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
            usage=total_usage([_usage(entry) for entry in run.entries]),
            latency_s=run.latency_s,
            score=score,
            failure=_failure(run.error) if run.error else None,
        )

    @contextlib.contextmanager
    def _context(self, run: _Run) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with dspy.context(
                **self._task.settings,
                lm=self._lm,
                adapter=self._task.adapter,
                trace=run.steps,
                max_trace_size=MAX_TRACE_STEPS,
                **{ENTRIES: run.entries},
            ):
                yield
        except Exception as error:
            run.error = error
        finally:
            run.latency_s = time.perf_counter() - start

    def _run_sync(self, example: dspy.Example, run: _Run) -> None:
        with self._context(run):
            run.returned = self._task.program(**example.inputs())
            run.prediction = as_prediction(run.returned)

    async def _run_async(self, example: dspy.Example, run: _Run) -> None:
        with self._context(run):
            run.returned = await self._task.program.acall(**example.inputs())
            run.prediction = as_prediction(run.returned)

    async def _score(self, example: dspy.Example, run: _Run) -> Score | None:
        if self._metric is None or run.prediction is None:
            return None
        metric: Callable[..., Any] = self._task.metric  # type: ignore[assignment]

        def score() -> Score:
            # The metric may ask an LM of its own, but must not add steps to the trace.
            with judging(self._task, self._judge):
                return score_prediction(metric, self._metric or "", example, run.returned)

        return await asyncio.get_running_loop().run_in_executor(self._threads, score)

    def _call(self, predictor: Any, inputs: dict[str, Any], outputs: Any) -> PredictorCall:
        name = predictor.stage if predictor.stage in self._names else None
        shown = as_shown(inputs, predictor.signature.input_fields)
        return PredictorCall(name, shown, jsonable(dict(outputs.items())))


def judging(task: Task, judge: dspy.BaseLM) -> contextlib.AbstractContextManager[None]:
    """The settings that a metric finds."""
    manager: contextlib.AbstractContextManager[None] = dspy.context(
        **task.settings, lm=judge, adapter=task.adapter, trace=None
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


def with_current_score(
    trace: Trace, example: dspy.Example, task: Task, judge: dspy.BaseLM
) -> Trace:
    """The trace, scored anew if its score is not by the task's metric as it is now.

    A changed metric changes what is kept, not what the teacher said: the program is not run.
    """
    identity = task.metric_identity
    if trace.prediction is None or identity == (trace.score and trace.score.metric):
        return trace
    if task.metric is None or identity is None:
        return dataclasses.replace(trace, score=None)
    prediction = revive_prediction(trace.prediction, task.program)
    with judging(task, judge):
        score = score_prediction(task.metric, identity, example, prediction)
    return dataclasses.replace(trace, score=score)


def _record(entry: dict[str, Any]) -> None:
    entries = dspy.settings.get(ENTRIES)
    if entries is not None:
        entries.append(entry)


def _usage(entry: dict[str, Any]) -> Usage:
    prompt_tokens, completion_tokens, cost_usd = call_usage(entry)
    return Usage(1, prompt_tokens, completion_tokens, cost_usd)


def _failure(error: Exception) -> Failure:
    if isinstance(error, AdapterParseError):
        kind = FailureKind.PARSE
    elif is_lm_error(error):
        kind = FailureKind.TEACHER
    else:
        kind = FailureKind.PROGRAM
    return Failure(kind, type(error).__name__, _describe(error))


def _describe(error: BaseException) -> str:
    return f"{error}"[:MAX_MESSAGE_CHARS] or type(error).__name__
