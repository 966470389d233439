"""Daemon threads that are used again: to wait for a call no longer than one wants to.

A new thread for each call would cost as much as a tenth of the call. One that hangs keeps its
thread, which an executor would wait for at the end of the process.
"""

import contextvars
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

_idle: deque["queue.SimpleQueue[Callable[[], None]]"] = deque()


def start(work: Callable[[], Result]) -> "Future[Result]":
    """Begin the work in a thread, in a copy of this context."""
    future: Future[Result] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:
            # Whatever it is, it is raised where the result is asked for.
            future.set_exception(error)

    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="lm-call", daemon=True).start()
    inbox.put(run)
    return future


def has_ended(future: "Future[Result]", within_s: float) -> bool:
    """Wait for the work, for so long at the most."""
    try:
        future.exception(within_s)
    except TimeoutError:
        return False
    return True


def _serve(inbox: "queue.SimpleQueue[Callable[[], None]]") -> None:
    while True:
        inbox.get()()
        _idle.append(inbox)
