"""Progress events on their way from a worker to the driver, and word to stop on its way back."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distill.training.events import Event
from serve.errors import TrainingError

T = TypeVar("T")

_POLL_S = 0.5


class Mailbox:
    """Holds events until they are taken, and whether the workers are to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._cancelled = False

    def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def cancel(self) -> None:
        """Tell the workers to stop."""
        self._cancelled = True

    def is_cancelled(self) -> bool:
        """Whether the workers are to stop."""
        return self._cancelled


class Progress:
    """A worker's end of a mailbox; without one, as on ranks other than 0, nothing is said."""

    def __init__(self, mailbox: Any | None) -> None:
        self._mailbox = mailbox

    def is_cancelled(self) -> bool:
        """Whether the driver wants training to stop."""
        return self._mailbox is not None and ray.get(self._mailbox.is_cancelled.remote())

    def send(self, event: Event, wait: bool = False) -> None:
        """Send an event; with ``wait``, until it and all before it have arrived."""
        if self._mailbox is None:
            return
        sent = self._mailbox.put.remote(event)
        if wait:
            ray.get(sent)


def run_with_events(
    work: Callable[[Any], T],
    on_event: Callable[[Event], None],
    cancelled: Callable[[], bool] = lambda: False,
    on_start: Callable[[], None] = lambda: None,
) -> T:
    """Do work in a thread, and hand its events to a callback in this one meanwhile.

    An interrupt reaches the caller at once. Ray Train's ``fit``, called in the main thread,
    would take the signal for itself, end the process with success, and keep the signal.

    Args:
        work: Called with an actor handle of a ``Mailbox``.
        on_event: What it raises is raised here; the work is then told to stop.
        cancelled: Asked meanwhile; the work is told to stop when it says so.
        on_start: Called before the first event.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
    started = told = finished = False
    running = _in_thread(lambda: work(mailbox))
    try:
        while not finished:
            finished = bool(wait([running], timeout=_POLL_S).done)
            # Any call of Ray's would start another one in the place of the one that has gone.
            if not ray.is_initialized():
                raise TrainingError("Training ended with the Ray that it ran on.")
            for event in ray.get(mailbox.take.remote()):
                if not started:
                    started = True
                    on_start()
                on_event(event)
            if not told and cancelled():
                told = True
                mailbox.cancel.remote()
    except BaseException:
        if ray.is_initialized():
            mailbox.cancel.remote()
        raise
    return running.result()


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: once interrupted, the process ends without waiting for the workers to stop.
    threading.Thread(target=run, name="training", daemon=True).start()
    return future
