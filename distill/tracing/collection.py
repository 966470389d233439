"""A task to run over examples with an LM: what there is to do, and what the store holds of it.

Reads only. Running what the store does not hold yet is ``collect``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dspy

from distill.datasets import distinct
from distill.fingerprints import fingerprint
from distill.programs import Task, program_fingerprint
from distill.tracing.actor import LmSpec
from distill.tracing.conductor import CallSettings, Conductor
from distill.tracing.governor import gate_when_asked
from distill.tracing.limits import Limits
from distill.tracing.permits import Bounds
from distill.tracing.service import Service
from distill.tracing.spending import cost_usd, paid_by_predictor
from distill.tracing.store import TraceStore
from distill.tracing.trace import Trace, Usage
from distill.tracing.tracer import with_current_score
from distill.tracing.work import Work
from serve.dspy_lm import governed
from serve.errors import BudgetExceeded, BudgetSpent, CallPrevented, TracingError


@dataclass(frozen=True)
class Collection:
    """A task to run over examples with an LM, and how.

    Attributes:
        actors: How many there are at least.
        concurrency: Calls of the program in flight for each actor.
        calls: How LMs are called.
        max_actors: How many there may be; None is no more than ``actors``.
        samples: Runs of each example.
        hints: Whether an example that no run of passed gets one more, with the label as a hint.
        threshold: See ``trace.passes``.
        service: What has to be served for the teacher to answer; None is nothing.
    """

    task: Task
    lm: LmSpec
    examples: Sequence[dspy.Example]
    store: TraceStore
    actors: int
    concurrency: int
    limits: Limits
    calls: CallSettings = field(default_factory=CallSettings)
    max_actors: int | None = None
    samples: int = 1
    hints: bool = False
    threshold: float | None = None
    service: Service | None = None

    def work(self) -> Work:
        """The units of it, none of them done."""
        context = fingerprint([program_fingerprint(self.task), self.lm.identity])
        return Work(distinct(self.examples), context, self.samples, self.hints)

    def keys(self) -> Mapping[str, int]:
        """The keys of its traces, those of one example together."""
        return self.work().keys

    def traces(self) -> Iterator[Trace]:
        """What the store holds of it, by example and then sample, scored by today's metric.

        Raises:
            BudgetExceeded, TracingError: The metric asks an LM, and may not.
        """
        work = self.work()
        with self.scoring() as scored:
            for trace in self.store.read(work.keys):
                yield scored(trace, work.example(trace.key))

    def paid(self) -> dict[str, Usage]:
        """What it has paid for, by predictor: first tries that were replaced as well."""
        keys = self.keys()
        records = (trace for trace in self.store.scan() if trace.key in keys)
        return paid_by_predictor(records, self.lm.override_lms)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[Callable[[Trace, dspy.Example], Trace]]:
        """Scores traces of an example by the metric as it is now; the LM it asks is governed.

        Raises:
            BudgetExceeded, TracingError: As ``traces``.
        """
        failed: list[Exception] = []
        serving = self.service.running if self.service else contextlib.nullcontext
        with gate_when_asked(self.store.uri, self._bounds, serving) as gate:
            conductor = Conductor(gate, self.calls, lambda _: None, failed.append)
            judge = governed((self.lm.judge or self.lm.make)(), conductor)

            def scored(trace: Trace, example: dspy.Example) -> Trace:
                found = with_current_score(trace, example, self.task, judge)
                _raise_prevented(failed)
                return found

            yield scored

    def _bounds(self) -> Bounds:
        return self.limits.bounds(cost_usd(self.paid()))


def _raise_prevented(failed: Sequence[Exception]) -> None:
    # Not a bad score: what the metric would have said is not known.
    for error in failed:
        if isinstance(error, BudgetSpent):
            raise BudgetExceeded(f"The metric asks an LM: {error}") from error
        if isinstance(error, CallPrevented):
            raise TracingError(f"The metric asks an LM: {error}") from error
