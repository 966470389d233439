"""A process's way to the limiter: permits for its calls, asked for in batches.

Calls ask here, from threads and event loops alike; one thread speaks with the limiter for all
of them, so that hundreds of calls a second are a few dozen messages. What the limiter says is
``limiter``; that it may be an actor on another machine is ``governor``.
"""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from distill.tracing.limiter import LEASE_S
from distill.tracing.permits import Ask, Outcome, Permit, Stop

SOON_S = 0.003
"""So long somebody waits for others to ask with him."""
FLUSH_S = 0.1
HEARTBEAT_S = 2.0
MAX_POLL_S = 0.25
MAX_SPARE = 64


@dataclass(frozen=True)
class Report:
    """What a process says: the calls that are over, permits it did not use, and its asks."""

    holder: str
    outcomes: Sequence[tuple[int, Outcome]] = ()
    returned: Sequence[int] = ()
    asks: Sequence[Ask] = ()


@dataclass(frozen=True)
class Reply:
    """What it hears: a permit or None for each ask, and when to ask again."""

    permits: Sequence[Permit | None]
    wait_s: float
    stopped: Stop | None = None


class Stopped(Exception):
    """No call is let through any more."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop)
        self.stop = stop


class Gate:
    """Lets the calls of a process through, each with a permit.

    Args:
        exchange: Brings a report to the limiter, and its reply.
    """

    def __init__(self, exchange: Callable[[Report], Reply]) -> None:
        self._exchange = exchange
        self._holder = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._wake, self._urgent = threading.Event(), threading.Event()
        self._waiting: deque[tuple[Ask, Future[Permit]]] = deque()
        self._spare: dict[Ask, deque[tuple[Permit, float]]] = {}
        self._started: dict[Ask, int] = {}
        self._outcomes: list[tuple[int, Outcome]] = []
        self._returned: list[int] = []
        self._in_flight = 0
        self._short = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)

    def enter(self, ask: Ask) -> Permit:
        """Wait for leave to make a call.

        Raises:
            Stopped: There will be none.
        """
        return self._request(ask).result()

    async def aenter(self, ask: Ask) -> Permit:
        """The same on an event loop."""
        future = self._request(ask)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel() and future.exception() is None:
                self.give_back(future.result())
            raise

    def give_back(self, permit: Permit) -> None:
        """Say that there will be no call for a permit."""
        with self._lock:
            self._returned.append(permit.id)
            self._in_flight -= 1
        self._wake.set()

    def leave(self, permit: Permit, outcome: Outcome) -> None:
        """Say how the call ended that a permit was for."""
        with self._lock:
            self._outcomes.append((permit.id, outcome))
            self._in_flight -= 1
            waiting = bool(self._waiting)
        self._wake.set()
        if waiting:
            self._urgent.set()

    def _request(self, ask: Ask) -> "Future[Permit]":
        future: Future[Permit] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._thread.ident is None:
                self._thread.start()
            self._started[ask] = self._started.get(ask, 0) + 1
            permit = self._take(ask)
            if permit is not None:
                future.set_result(permit)
                return future
            self._waiting.append((ask, future))
        self._wake.set()
        self._urgent.set()
        return future

    def _take(self, ask: Ask) -> Permit | None:
        spare = self._spare.get(ask)
        while spare:
            permit, expires = spare.popleft()
            if time.monotonic() < expires:
                self._in_flight += 1
                return permit
            self._returned.append(permit.id)
        return None

    def _run(self) -> None:
        while True:
            self._wake.wait(HEARTBEAT_S if self._holds() else None)
            # What has ended can be told with what comes next, unless somebody waits.
            self._urgent.wait(FLUSH_S)
            time.sleep(SOON_S)
            self._wake.clear()
            self._urgent.clear()
            try:
                poll_s = self._speak()
            except Exception as error:
                # Whatever it is, the calls that wait must hear of it.
                self._fail(error)
                return
            if poll_s is not None:
                self._urgent.wait(poll_s)
                self._wake.set()
                self._urgent.set()

    def _holds(self) -> bool:
        return self._in_flight > 0 or any(self._spare.values())

    def _speak(self) -> float | None:
        """Exchange once; seconds until it makes sense to ask again, if somebody waits."""
        asked_at = time.monotonic()
        with self._lock:
            self._expire(asked_at)
            waiting = list(self._waiting)
            asks = [ask for ask, _ in waiting]
            for ask, started in self._started.items():
                asks += [ask] * self._more(ask, started)
            self._started.clear()
            report = Report(self._holder, self._outcomes, self._returned, asks)
            self._outcomes, self._returned = [], []
        reply = self._exchange(report)
        with self._lock:
            self._hand_out(asks, reply, asked_at + LEASE_S)
            if reply.stopped is not None:
                self._error = Stopped(reply.stopped)
            self._short = bool(self._waiting)
        if self._error is not None:
            self._fail(self._error)
        return min(reply.wait_s, MAX_POLL_S) if self._short else None

    def _more(self, ask: Ask, started: int) -> int:
        """Permits to ask for ahead: as many as were just used."""
        if self._short:
            return 0
        return max(min(2 * started + 2, MAX_SPARE) - len(self._spare.get(ask, ())), 0)

    def _expire(self, now: float) -> None:
        for spare in self._spare.values():
            while spare and spare[0][1] <= now:
                self._returned.append(spare.popleft()[0].id)

    def _hand_out(self, asks: Sequence[Ask], reply: Reply, expires: float) -> None:
        for ask, permit in zip(asks, reply.permits, strict=True):
            if permit is not None:
                self._spare.setdefault(ask, deque()).append((permit, expires))
        still: deque[tuple[Ask, Future[Permit]]] = deque()
        while self._waiting:
            ask, future = self._waiting.popleft()
            if future.cancelled():
                continue
            permit = self._take(ask)
            if permit is None:
                still.append((ask, future))
            elif future.set_running_or_notify_cancel():
                future.set_result(permit)
            else:
                self._in_flight -= 1
                self._returned.append(permit.id)
        self._waiting = still

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            self._short = False
            waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


class OpenGate:
    """Lets every call through: for LMs of one's own, and where there is no limiter."""

    def enter(self, ask: Ask) -> Permit:
        """Leave at once."""
        return Permit(0, 0)

    async def aenter(self, ask: Ask) -> Permit:
        """The same."""
        return Permit(0, 0)

    def leave(self, permit: Permit, outcome: Outcome) -> None:
        """Nobody wants to know."""
