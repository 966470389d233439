"""What was paid for: of a trace, and of all the traces of a job."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from distill.tracing.trace import METRIC, Trace, Usage, total_usage


def paid(trace: Trace, ours: bool) -> Mapping[str, Usage]:
    """What of a trace was paid, by predictor.

    Args:
        trace: The trace.
        ours: Whether the program's calls were answered by a student, which costs nothing; its
            metric may still ask an LM that does.
    """
    if not ours:
        return trace.usages
    return {name: usage for name, usage in trace.usages.items() if name == METRIC}


def cost_usd(usages: Mapping[str, Usage]) -> float:
    """The known cost of usages by predictor."""
    return sum(usage.cost_usd or 0.0 for usage in usages.values())


@dataclass
class Spending:
    """Adds up what was paid, of every record of a store that comes by.

    Attributes:
        ours: See ``paid``.
        by_predictor: The sums.
        cost_usd: The known cost of all.
    """

    ours: bool = False
    by_predictor: dict[str, Usage] = field(default_factory=dict)
    cost_usd: float = 0.0

    def add(self, trace: Trace) -> None:
        """Count a trace: first tries that others have replaced were paid as well."""
        usages = paid(trace, self.ours)
        self.cost_usd += cost_usd(usages)
        for name, usage in usages.items():
            self.by_predictor[name] = total_usage([self.by_predictor.get(name, Usage()), usage])
