"""What there is to trace, and what has become of it: pure, and small for each example.

Owns the keys of traces, the order of work, and when a hint or another chance is due. Each
example is run ``samples`` times, and once more with a hint where none of them passed.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import dspy

from distill.fingerprints import fingerprint
from distill.tracing.variants import Variant

MAX_DEATHS = 3
"""Of the process around an example, before the example is taken for the cause."""


class Outcome(IntEnum):
    """What became of one run; the first three are not finished."""

    NEW = 0
    CLOSED = 1
    """A hint, which is only due once the samples have failed."""
    OUT = 2
    """Handed out."""
    PASSED = 3
    REJECTED = 4
    """By the metric, or because the reply or the program failed."""
    UNANSWERED = 5
    """The teacher was the one that failed."""


@dataclass(frozen=True)
class Unit:
    """One run of the program on one example."""

    key: str
    example: dspy.Example
    example_id: str
    """As the driver tells it: of values without a JSON form, another process might tell another."""
    variant: Variant


class Work:
    """The units of a collection, and how far they are.

    Args:
        examples: By example id.
        context: Names program, LM and settings.
        samples: Runs of each example.
        hints: Whether an example that no run of passed gets one more, with a hint.
    """

    def __init__(
        self, examples: Mapping[str, dspy.Example], context: str, samples: int, hints: bool
    ) -> None:
        self._ids, self._examples = list(examples), list(examples.values())
        self._samples, self._width = samples, samples + hints
        self._keys = [
            _key(identity, context, variant, variant == samples)
            for identity in examples
            for variant in range(self._width)
        ]
        self._units = {key: unit for unit, key in enumerate(self._keys)}
        self._state = bytearray(len(self._keys))
        for unit in range(samples, len(self._keys), self._width) if hints else ():
            self._state[unit] = Outcome.CLOSED
        self.remaining = self.total = samples * len(self._examples)
        self._next = 0
        self._again: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int] = Counter()

    @property
    def keys(self) -> Mapping[str, int]:
        """The keys of all traces that there may be, an example's together and in order."""
        return self._units

    def example(self, key: str) -> dspy.Example:
        """The example that a key is of."""
        return self._examples[self._units[key] // self._width]

    def is_finished(self, key: str) -> bool:
        """Whether the unit's outcome is known."""
        return self._state[self._units[key]] > Outcome.OUT

    def finish(self, key: str, outcome: Outcome) -> None:
        """Note what became of a unit; a hint may be due then."""
        unit = self._units[key]
        if self._state[unit] == Outcome.NEW:
            self.remaining -= 1
        if self._state[unit] == Outcome.CLOSED:
            self.total += 1
        self._state[unit] = outcome
        self._open_hint(unit)

    def take(self, beside: Sequence[str]) -> Unit | None:
        """The next unit for an actor that holds these keys already; None if there is none.

        A unit whose process has died more than once runs alone, so that others don't die of it.
        """
        if self._suspects and not beside:
            return self._hand_out(self._suspects.popleft())
        if self._deaths and any(self._deaths[self._units[key]] > 1 for key in beside):
            return None
        unit = self._again.popleft() if self._again else self._next_new()
        return None if unit is None else self._hand_out(unit)

    def put_back(self, key: str) -> bool:
        """A unit's process died; returns whether the unit runs again."""
        unit = self._units[key]
        self._deaths[unit] += 1
        if self._deaths[unit] >= MAX_DEATHS:
            return False
        (self._suspects if self._deaths[unit] > 1 else self._again).append(unit)
        self._state[unit] = Outcome.NEW
        self.remaining += 1
        return True

    def _next_new(self) -> int | None:
        while self._next < len(self._state):
            unit, self._next = self._next, self._next + 1
            if self._state[unit] == Outcome.NEW:
                return unit
        return None

    def _hand_out(self, unit: int) -> Unit:
        self._state[unit] = Outcome.OUT
        self.remaining -= 1
        number, variant = divmod(unit, self._width)
        hinted = variant == self._samples
        example, identity = self._examples[number], self._ids[number]
        chosen = Variant(0 if hinted else variant, hinted)
        return Unit(self._keys[unit], example, identity, chosen)

    def _open_hint(self, unit: int) -> None:
        first = unit - unit % self._width
        hint = first + self._samples
        if self._width == self._samples or self._state[hint] != Outcome.CLOSED:
            return
        outcomes = set(self._state[first:hint])
        rejected = Outcome.REJECTED in outcomes and outcomes <= {
            Outcome.REJECTED,
            Outcome.UNANSWERED,
        }
        if rejected and self._examples[unit // self._width].labels().keys():
            self._state[hint] = Outcome.NEW
            self.remaining += 1
            self.total += 1
            if hint < self._next:
                self._again.append(hint)


def _key(identity: str, context: str, variant: int, hinted: bool) -> str:
    parts: list[str | int] = [identity, context]
    if hinted:
        parts.append("hint")
    elif variant:
        parts.append(variant)
    return fingerprint(parts)
