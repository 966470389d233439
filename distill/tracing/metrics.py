"""What tracing does as Ray's metrics, which Prometheus reads at every node's metrics port.

Counted by the driver, from what actors acknowledge: the numbers are those that the run itself
goes by, and an actor that dies takes none of them along. Ray puts ``ray_`` before the names, and
hands the values on every ten seconds.
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from distill.tracing.trace import Usage

PREFIX = "raydistill_trace"


class TraceMetrics:
    """The metrics of one job; a context manager, at whose end nothing is in flight.

    Args:
        run: The run's name, a tag of every metric.
        stage: What the job is to the run, another one: ``trace``, ``evaluate student``.
    """

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._examples = self._counter("examples", "Runs of the program that ended")
        self._rejections = self._counter(
            "rejections", "Runs that failed or did not pass the metric", "reason"
        )
        self._calls = self._counter("calls", "LM calls that were answered", "predictor")
        self._tokens = self._counter("tokens", "Tokens of those calls", "predictor", "kind")
        self._cost = self._counter("cost_usd", "What those calls cost", "predictor")
        self._in_flight = Gauge(
            f"{PREFIX}_in_flight", "Runs of the program under way", ("run", "stage")
        )
        self._in_flight.set_default_tags(self._tags)

    def __enter__(self) -> "TraceMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.in_flight(0)

    def in_flight(self, number: int) -> None:
        """So many runs of the program are under way."""
        self._in_flight.set(number)

    def ended(self, rejected: str | None, usages: Mapping[str, Usage]) -> None:
        """A run of the program has ended and is durable.

        Args:
            rejected: Why it was, as ``rejection`` says.
            usages: What it took, by predictor.
        """
        self._examples.inc()
        if rejected:
            self._rejections.inc(tags={"reason": rejected})
        for predictor, usage in usages.items():
            tags = {"predictor": predictor}
            self._add(self._calls, usage.calls, tags)
            self._add(self._tokens, usage.prompt_tokens, {**tags, "kind": "prompt"})
            self._add(self._tokens, usage.completion_tokens, {**tags, "kind": "completion"})
            self._add(self._cost, usage.cost_usd, tags)

    def _counter(self, name: str, description: str, *tags: str) -> Counter:
        counter = Counter(f"{PREFIX}_{name}_total", description, ("run", "stage", *tags))
        counter.set_default_tags(self._tags)
        return counter

    @staticmethod
    def _add(counter: Counter, value: float | None, tags: dict[str, str]) -> None:
        if value:  # Ray counts nothing that is not more than nothing.
            counter.inc(value, tags=tags)
