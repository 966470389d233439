"""A process's way to the limiter: permits for its calls, asked for in batches.

Calls ask here, from threads and event loops alike; one thread speaks with the limiter for all
of them, so that hundreds of calls a second are a few dozen messages. Where there is nothing to
keep to the limiter says so, and calls pass at once and are told of afterwards. What the limiter
says is ``limiter``; that it may be an actor on another machine is ``governor``.
"""

import asyncio
import contextvars
import itertools
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from distill.tracing.permits import Ask, Outcome, Permit, Refusal, Stop
from serve.errors import CallPrevented

SOON_S = 0.003
"""So long somebody waits for others to ask with him."""
FLUSH_S = 0.1
"""So long what nobody waits for is held back, to be told with more."""
HEARTBEAT_S = 2.0


@dataclass(frozen=True)
class Report:
    """What a process says.

    Attributes:
        holder: The process.
        begun: Calls that did not have to ask, by a negative number of the process's own.
        sent: Calls whose requests have left.
        outcomes: How calls ended.
        returned: Permits of which nothing was made.
        asks: What it would do.
    """

    holder: str
    begun: Sequence[tuple[int, Ask]] = ()
    sent: Sequence[int] = ()
    outcomes: Sequence[tuple[int, Outcome]] = ()
    returned: Sequence[int] = ()
    asks: Sequence[Ask] = ()


@dataclass(frozen=True)
class Reply:
    """What it hears.

    Attributes:
        permits: A permit or None for each ask.
        wait_s: When to ask again for what there was none.
        pace_s: When to tell what is not urgent.
        refusal: Why there will be no permit any more.
        free: Models whose calls need not ask until the next reply, and the outages of each.
    """

    permits: Sequence[Permit | None]
    wait_s: float = 0.0
    pace_s: float = FLUSH_S
    refusal: Refusal | None = None
    free: Mapping[str, int] = field(default_factory=dict)


class Gate:
    """Lets the calls of a process through, each with a permit.

    Args:
        exchange: Brings a report to the limiter, and its reply.
    """

    def __init__(self, exchange: Callable[[Report], Reply]) -> None:
        self._exchange = exchange
        self._holder = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._news, self._urgent = threading.Event(), threading.Event()
        self._waiting: deque[tuple[Ask, Future[Permit]]] = deque()
        self._free: Mapping[str, int] = {}
        self._numbers = itertools.count(-1, -1)
        self._begun: list[tuple[int, Ask]] = []
        self._sent: list[int] = []
        self._outcomes: list[tuple[int, Outcome]] = []
        self._returned: list[int] = []
        self._in_flight = 0
        self._refusal: Refusal | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)

    def enter(self, ask: Ask) -> Permit:
        """Wait for leave to make a call.

        Raises:
            CallPrevented: There will be none.
        """
        found = self._request(ask)
        return found if isinstance(found, Permit) else found.result()

    async def aenter(self, ask: Ask) -> Permit:
        """The same on an event loop."""
        found = self._request(ask)
        if isinstance(found, Permit):
            return found
        try:
            return await asyncio.wrap_future(found)
        except asyncio.CancelledError:
            if not found.cancel() and found.exception() is None:
                self._give_back(found.result())
            raise

    def sent(self, permit: Permit) -> None:
        """Say that a call's request has left by now."""
        if permit.id > 0:
            with self._lock:
                self._sent.append(permit.id)
            self._news.set()

    def leave(self, permit: Permit, outcome: Outcome) -> None:
        """Say how the call ended that a permit was for."""
        with self._lock:
            self._outcomes.append((permit.id, outcome))
            self._in_flight -= 1
            is_urgent = bool(self._waiting) or outcome.failure is not None
        self._tell(is_urgent)

    def close(self, refusal: Refusal) -> None:
        """Let no call through any more; what is under way may still be told of.

        Args:
            refusal: What those hear who wait, and those who come.
        """
        self._refuse(refusal)
        self._closed = True
        self._tell(is_urgent=True)

    def _give_back(self, permit: Permit) -> None:
        with self._lock:
            self._returned.append(permit.id)
            self._in_flight -= 1
        self._tell(is_urgent=True)

    def _request(self, ask: Ask) -> "Permit | Future[Permit]":
        found: Permit | Future[Permit]
        with self._lock:
            if self._refusal is not None:
                raise _prevented(self._refusal)
            if self._thread.ident is None:
                # It outlives the call that is the first, and so must not keep what that knows.
                contextvars.Context().run(self._thread.start)
            is_free = ask.model in self._free
            if is_free:
                found = Permit(next(self._numbers), self._free[ask.model])
                self._begun.append((found.id, ask))
                self._in_flight += 1
            else:
                found = Future()
                self._waiting.append((ask, found))
        self._tell(is_urgent=not is_free)
        return found

    def _tell(self, is_urgent: bool) -> None:
        self._news.set()
        if is_urgent:
            self._urgent.set()

    def _run(self) -> None:
        reply = Reply(())
        while self._wait(reply):
            try:
                reply = self._speak()
            except Exception as error:
                # Whatever it is, the calls that wait must hear of it.
                why = f"Nobody lets the run's calls through: {type(error).__name__}: {error}"
                self._refuse(Refusal(Stop.LOST, why))
                return
            if reply.refusal is not None:
                self._refuse(reply.refusal)

    def _wait(self, reply: Reply) -> bool:
        """Wait for something to say; False is that there will be nothing any more."""
        if self._is_over():
            return False
        if self._waiting:
            self._urgent.wait(reply.wait_s)
        else:
            self._news.wait(HEARTBEAT_S if self._in_flight else None)
            self._urgent.wait(reply.pace_s)
        time.sleep(SOON_S)
        self._news.clear()
        self._urgent.clear()
        return not self._is_over()

    def _is_over(self) -> bool:
        return self._closed and not (self._in_flight or self._outcomes or self._returned)

    def _speak(self) -> Reply:
        with self._lock:
            waiting = [each for each in self._waiting if not each[1].cancelled()]
            self._waiting = deque(waiting)
            report = Report(
                self._holder,
                begun=self._begun,
                sent=self._sent,
                outcomes=self._outcomes,
                returned=self._returned,
                asks=[ask for ask, _ in waiting],
            )
            self._begun, self._sent, self._outcomes, self._returned = [], [], [], []
        reply = self._exchange(report)
        with self._lock:
            self._free = reply.free
            for (_, future), permit in zip(waiting, reply.permits, strict=True):
                if permit is not None:
                    self._hand_out(future, permit)
            self._waiting = deque(each for each in self._waiting if not each[1].done())
        return reply

    def _hand_out(self, future: "Future[Permit]", permit: Permit) -> None:
        # Closing may have answered it meanwhile.
        if not future.done() and future.set_running_or_notify_cancel():
            self._in_flight += 1
            future.set_result(permit)
        else:
            self._returned.append(permit.id)
            self._news.set()

    def _refuse(self, refusal: Refusal) -> None:
        with self._lock:
            self._refusal = refusal
            waiting, self._waiting = self._waiting, deque()
            for _, future in waiting:
                if future.set_running_or_notify_cancel():
                    future.set_exception(_prevented(refusal))


def _prevented(refusal: Refusal) -> CallPrevented:
    return CallPrevented(refusal.why, refusal.stop)


class OpenGate:
    """Lets every call through: for LMs of one's own, and where there is no limiter."""

    def enter(self, ask: Ask) -> Permit:
        """Leave at once."""
        return Permit(0)

    async def aenter(self, ask: Ask) -> Permit:
        """The same."""
        return Permit(0)

    def sent(self, permit: Permit) -> None:
        """Nobody wants to know."""

    def leave(self, permit: Permit, outcome: Outcome) -> None:
        """Nor this."""
