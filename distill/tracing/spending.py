"""What was paid for: of a trace, and of all the traces of a job."""

from collections.abc import Iterable, Mapping

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


def paid_by_predictor(traces: Iterable[Trace], ours: bool) -> dict[str, Usage]:
    """The same of many traces."""
    found: dict[str, Usage] = {}
    for trace in traces:
        for name, usage in paid(trace, ours).items():
            found[name] = total_usage([found.get(name, Usage()), usage])
    return found


def cost_usd(usages: Mapping[str, Usage]) -> float:
    """The known cost of usages by predictor."""
    return sum(usage.cost_usd or 0.0 for usage in usages.values())
