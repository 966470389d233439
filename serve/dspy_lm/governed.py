"""LMs whose every call is conducted by somebody else, who counts, waits and tries again.

Owns how that is done to any LM: a copy of a subclass made for it, with DSPy's own retries
off. When to call, for how long to wait, and what to do about a failure, is the conductor's to
say.
"""

import contextlib
import contextvars
import copy
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

import dspy

Entry = dict[str, Any]
"""What DSPy records of a call: prompt, outputs, usage, cost."""
Attempt = Callable[[float | None], tuple[Any, list[Entry]]]
"""Makes the call once, and tells its client to wait so many seconds at most, where that is known
how; returns outputs and entries."""
AsyncAttempt = Callable[[float | None], Awaitable[tuple[Any, list[Entry]]]]

_entries: contextvars.ContextVar[list[Entry] | None] = contextvars.ContextVar(
    "raydistill_entries", default=None
)


class Conductor(Protocol):
    """Makes the calls of governed LMs."""

    def conduct(self, lm: dspy.BaseLM, requests: int, attempt: Attempt) -> Any:
        """Make one call, of so many requests, by one attempt or several."""

    async def aconduct(self, lm: dspy.BaseLM, requests: int, attempt: AsyncAttempt) -> Any:
        """The same on an event loop."""


_classes: dict[type, type] = {}


def governed(lm: dspy.BaseLM, conductor: Conductor) -> dspy.BaseLM:
    """A copy of the LM whose calls the conductor makes, as those of its own copies.

    Its calls do not enter DSPy's histories, which would keep every prompt.
    """
    if isinstance(lm, _Governed):
        return lm
    # Not lm.copy(), which in DSPy 3.1 wants to copy clients and locks as well.
    twin: Any = copy.copy(lm)
    twin.kwargs, twin.callbacks = dict(lm.kwargs), list(getattr(lm, "callbacks", None) or [])
    twin.history = []
    twin.num_retries = 0
    twin._raydistill = _Control(conductor, max(int(getattr(lm, "num_retries", 0) or 0), 0))
    twin.__class__ = _class_of(type(lm))
    return twin


def is_cached(lm: dspy.BaseLM) -> bool:
    """Whether DSPy may answer a call from its own cache, which costs nothing."""
    return isinstance(lm, dspy.LM) and bool(lm.cache)


def retries_of(lm: dspy.BaseLM) -> int:
    """How often a governed LM would have tried a failed call again by itself."""
    control: _Control = lm._raydistill
    return control.max_retries


def own_timeout_s(lm: dspy.BaseLM) -> Any:
    """The timeout that an LM was made with: seconds, None, or its client's own way to say it."""
    given = lm.kwargs.get("timeout")
    return float(given) if isinstance(given, int | float) else given


ROLLOUT = "raydistill_rollout"
"""Key in DSPy's settings: the number of the run that calls are for, of several alike."""
ROLLOUT_TEMPERATURE = 1.0
"""Of runs after the first, where the LM's own is 0: they would all be the same."""


MAX_OWN_ROLLOUTS = 1_000_000
"""Numbers that a program may give to runs of its own."""


def _rollout(lm: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the call is asked with besides, so that it is one of the run under way."""
    number = dspy.settings.get(ROLLOUT)
    if not number or "request" in kwargs:
        return {}

    def given(name: str) -> Any:
        return kwargs.get(name, lm.kwargs.get(name))

    options = {"temperature": given("temperature") or ROLLOUT_TEMPERATURE}
    # DSPy's own word, for its cache; a program that asks several times has its own numbers.
    if isinstance(lm, dspy.LM):
        options["rollout_id"] = number * MAX_OWN_ROLLOUTS + (given("rollout_id") or 0)
    return options


class _Control:
    """What makes an LM a governed one; its copies, deep ones too, have the same."""

    def __init__(self, conductor: Conductor, max_retries: int) -> None:
        self.conductor, self.max_retries = conductor, max_retries

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Control":
        return self


class _Governed:
    """Mixed into an LM's own class; see ``governed``."""

    _raydistill: _Control

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**kwargs, **_rollout(self, kwargs)}

        def attempt(timeout_s: float | None) -> tuple[Any, list[Entry]]:
            with _recording() as entries:
                options = _timeout(self, args, kwargs, timeout_s)
                once: Any = super(_Governed, self)
                return once.__call__(*args, **kwargs, **options), entries

        return self._raydistill.conductor.conduct(self, _requests(self, kwargs), attempt)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**kwargs, **_rollout(self, kwargs)}

        async def attempt(timeout_s: float | None) -> tuple[Any, list[Entry]]:
            with _recording() as entries:
                options = _timeout(self, args, kwargs, timeout_s)
                once: Any = super(_Governed, self)
                return await once.acall(*args, **kwargs, **options), entries

        return await self._raydistill.conductor.aconduct(self, _requests(self, kwargs), attempt)

    def update_history(self, entry: Entry) -> None:
        entries = _entries.get()
        if entries is not None:
            entries.append(entry)


def _class_of(kind: type) -> Any:
    if kind not in _classes:
        members = {"__module__": __name__}
        _classes[kind] = type(f"Governed{kind.__name__}", (_Governed, kind), members)
    return _classes[kind]


@contextlib.contextmanager
def _recording() -> Iterator[list[Entry]]:
    entries: list[Entry] = []
    token = _entries.set(entries)
    try:
        # Where a program has turned histories off, its calls cost no less.
        if dspy.settings.disable_history:
            with dspy.context(disable_history=False):
                yield entries
        else:
            yield entries
    finally:
        _entries.reset(token)


def _requests(lm: Any, kwargs: dict[str, Any]) -> int:
    """How many requests a call may be: DSPy 3.4 asks once for each choice."""
    number = kwargs.get("n", lm.kwargs.get("n"))
    return number if isinstance(number, int) and number > 0 else 1


def _timeout(lm: Any, args: Any, kwargs: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
    """The timeout as an option of the call, for LMs that take it so."""
    takes = isinstance(lm, dspy.LM) and isinstance(getattr(lm, "engine", "auto"), str)
    # DSPy's explicit requests carry all their options.
    explicit = "request" in kwargs or (args and not isinstance(args[0], str | None))
    if timeout_s is None or not takes or explicit or "timeout" in kwargs:
        return {}
    # DSPy's cache goes by the options: what it holds is not to be paid again.
    if kwargs.get("cache", lm.cache):
        return {}
    return {"timeout": timeout_s} if isinstance(own_timeout_s(lm), float | None) else {}
