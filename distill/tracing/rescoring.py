"""Scores stored traces by the metric as it is now, several at once.

A metric that asks an LM is paid for, so what it says is kept: as one more record of the same
trace, which has the new score, and the usage of the metric alone. Which record counts is for
``TraceStore.read``.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import dspy

from distill.programs import Task
from distill.tracing import callers
from distill.tracing.callers import Running
from distill.tracing.conductor import CallSettings, Conductor
from distill.tracing.gate import Gate
from distill.tracing.held import with_governed
from distill.tracing.permits import Refusal, Stop
from distill.tracing.spending import Spending
from distill.tracing.store import SegmentWriter, TraceStore
from distill.tracing.trace import METRIC, Trace, Usage, total_usage
from distill.tracing.tracer import is_scored, with_current_score
from serve.dspy_lm import governed
from serve.errors import BudgetExceeded, CallPrevented, TracingError
from serve.threads import allow_threads

SCORING = "raydistill_scoring"
"""Key in DSPy's settings, which follow a metric into its threads."""
LEAVE_S = 5.0
"""So long who is interrupted waits for answers that are paid for; their threads end with him."""
FINISH_S = 3600.0
"""So long who fails does; no call takes as long."""
_LEFT = Refusal(Stop.LOST, "Nobody waits for what the metric says any more.")


@dataclass
class _Scoring:
    """What the metric's LM took for one trace, and the calls that failed or were not made."""

    usages: list[Usage] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


class Rescorer:
    """Scores traces anew.

    Args:
        task: Whose metric scores.
        judge: The LM that the metric may ask.
        gate: Lets its calls through; closed after the last trace.
        calls: How they are made.
        store: Keeps the scores that were paid for.
        spending: Is added what they took.
    """

    def __init__(
        self,
        task: Task,
        judge: dspy.BaseLM,
        gate: Gate,
        calls: CallSettings,
        store: TraceStore,
        spending: Spending,
    ) -> None:
        conductor = Conductor(gate, calls, _record, _record_error)
        self._task = replace(task, settings=with_governed(task.settings, conductor))
        self._store, self._spending = store, spending
        self._gate = gate
        self._judge = governed(judge, conductor)
        self._unwritten: deque[Trace] = deque()
        self._writing = threading.Lock()
        self._writer: SegmentWriter | None = None

    def scored(
        self, traces: Iterable[tuple[Trace, dspy.Example]], concurrency: int
    ) -> Iterator[Trace]:
        """The traces in their order, each scored by the metric; so many at once.

        Raises:
            BudgetExceeded, TracingError: The metric asks an LM, and may not.
            TraceStoreError: What it said cannot be written.
        """
        allow_threads()
        window: deque[Running] = deque()
        patience_s = LEAVE_S
        try:
            for trace, example in traces:
                if not window and is_scored(trace, self._task):
                    yield trace
                    continue
                window.append(callers.start(partial(self._score, trace, example)))
                if len(window) == concurrency:
                    yield _first(window)
            while window:
                yield _first(window)
        except Exception:
            patience_s = FINISH_S
            raise
        finally:
            # First, since what waits there may do so for as long as an outage lasts.
            self._gate.close(_LEFT)
            _wait(window, patience_s)

    def _score(self, trace: Trace, example: dspy.Example) -> Trace:
        scoring = _Scoring()
        with dspy.context(**{SCORING: scoring}):
            found = with_current_score(trace, example, self._task, self._judge)
        # Where its LM failed it is not known what the metric would say: it is asked again.
        prevented = [each for each in scoring.errors if isinstance(each, CallPrevented)]
        failed = prevented or (scoring.errors and found.score and found.score.error)
        if scoring.usages:
            known = trace if failed else found
            self._keep(replace(known, usages={METRIC: total_usage(scoring.usages)}))
        for error in prevented:
            kind = BudgetExceeded if error.stop == Stop.BUDGET else TracingError
            raise kind(f"The metric asks an LM: {error}") from error
        return found

    def _keep(self, trace: Trace) -> None:
        self._unwritten.append(trace)
        with self._writing:
            # Whoever is first writes for all who wait, so one sync is for many.
            batch = [self._unwritten.popleft() for _ in range(len(self._unwritten))]
            if batch:
                # Only now, so that a store that nothing is paid for may be read-only.
                self._writer = self._writer or self._store.writer()
                self._writer.append([each.to_json() for each in batch])
            for each in batch:
                self._spending.add(each)


def _first(window: deque[Running]) -> Trace:
    """The first one's trace, which only then leaves the window."""
    while not window[0].wait(FINISH_S):
        pass
    found: Trace = window.popleft().result()
    return found


def _wait(window: Iterable[Running], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    for running in window:
        running.wait(deadline - time.monotonic())


def _record(usage: Usage) -> None:
    scoring = dspy.settings.get(SCORING)
    if scoring is not None:
        scoring.usages.append(usage)


def _record_error(error: Exception) -> None:
    scoring = dspy.settings.get(SCORING)
    if scoring is not None:
        scoring.errors.append(error)
