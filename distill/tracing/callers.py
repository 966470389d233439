"""Runs calls so that whoever waits for one can stop waiting.

A thread cannot be stopped from outside, so a call that takes too long goes on in the thread that
runs it; threads are used again once they are free, since to start one costs more than many a call.
"""

import contextvars
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Running:
    """A call under way in another thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._ended = threading.Lock()
        self._ended.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within so many seconds."""
        ended = self._ended.acquire(timeout=max(timeout_s, 0.0))
        if ended:
            self._ended.release()
        return ended

    def result(self) -> Any:
        """What it returned, or raises what it raised, once it has ended."""
        if self._error is not None:
            raise self._error
        return self._result

    def run(self) -> None:
        """Make the call; from the thread that it is for."""
        try:
            self._result = self._call()
        except BaseException as error:
            # Whatever it is, it is raised where the call was asked for.
            self._error = error
        self._ended.release()


_idle: deque["_Caller"] = deque()


def start(call: Callable[[], Any]) -> Running:
    """Have another thread make a call; in its own context, if it should have one."""
    running = Running(call)
    try:
        caller = _idle.pop()
    except IndexError:
        caller = _Caller()
        # Not in the context of this call: the thread outlives it.
        contextvars.Context().run(caller.start)
    caller.calls.put(running)
    return running


class _Caller(threading.Thread):
    """Makes one call after the other."""

    def __init__(self) -> None:
        super().__init__(name="lm-call", daemon=True)
        self.calls: SimpleQueue[Running] = SimpleQueue()

    def run(self) -> None:
        while True:
            self.calls.get().run()
            _idle.append(self)
