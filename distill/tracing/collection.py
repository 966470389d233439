"""A task to run over examples with an LM: what there is to do, and what the store holds of it.

Calls no teacher. Running what the store does not hold yet is ``collect``.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dspy

from distill.datasets import distinct
from distill.fingerprints import fingerprint
from distill.programs import Task, program_fingerprint
from distill.tracing.actor import LmSpec
from distill.tracing.conductor import CallSettings
from distill.tracing.governor import gate_when_asked
from distill.tracing.limits import Limits
from distill.tracing.permits import Bounds
from distill.tracing.rescoring import Rescorer
from distill.tracing.service import Service
from distill.tracing.spending import Spending
from distill.tracing.store import TraceStore
from distill.tracing.trace import Trace
from distill.tracing.work import Work


@dataclass(frozen=True)
class Collection:
    """A task to run over examples with an LM, and how.

    Attributes:
        actors: How many there are at least.
        concurrency: Calls of the program in flight for each actor.
        calls: How LMs are called.
        run, stage: What names it in Ray's metrics.
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
    run: str = ""
    stage: str = "trace"
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

    def traces(self, spending: Spending | None = None) -> Iterator[Trace]:
        """What the store holds of it, by example and then sample, scored by today's metric.

        Args:
            spending: Is added what all of this was paid, by the time that the last one is there.

        Raises:
            BudgetExceeded, TracingError: The metric asks an LM, and may not.
        """
        work = self.work()
        spending = spending or self.spending()
        found = self.store.read(work.keys, self.task.metric_identity, spending.add)
        serving = self.service.running if self.service else contextlib.nullcontext

        def bounds() -> Bounds:
            return self.limits.after(spending.cost_usd)

        with gate_when_asked(self.store.uri, bounds, serving) as gate:
            rescorer = Rescorer(
                self.task, (self.lm.judge or self.lm.make)(), gate, self.calls, self.store, spending
            )
            pairs = ((trace, work.example(trace.key)) for trace in found)
            yield from rescorer.scored(pairs, self.concurrency)

    def records(self, spending: Spending) -> Iterator[Trace]:
        """All that was ever recorded of it, in no particular order, as it was then.

        Args:
            spending: Is added what each was paid.
        """
        keys = self.keys()
        for trace in self.store.scan():
            if trace.key in keys:
                spending.add(trace)
                yield trace

    def spending(self) -> Spending:
        """Counts what is paid of it; nothing yet."""
        return Spending(ours=self.lm.override_lms)
