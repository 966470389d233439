"""Progress events on their way from a worker to a callback on the driver."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = dict[str, Any]
T = TypeVar("T")

_POLL_S = 0.5


class Mailbox:
    """Holds events until they are taken."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events


def run_with_events(work: Callable[[Any], T], on_event: Callable[[Event], None]) -> T:
    """Do work in a thread, and hand its events to a callback in this one meanwhile.

    An interrupt reaches the caller at once. Ray Train's ``fit``, called in the main thread,
    would take the signal for itself, end the process with success, and keep the signal.

    Args:
        work: Called with an actor handle of a ``Mailbox``.
        on_event: What it raises is raised here; the work then ends when Ray does.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
    pool = ThreadPoolExecutor(1, thread_name_prefix="training")
    try:
        running = pool.submit(work, mailbox)
        finished = False
        while not finished:
            finished = bool(wait([running], timeout=_POLL_S).done)
            for event in ray.get(mailbox.take.remote()):
                on_event(event)
        return running.result()
    finally:
        pool.shutdown(wait=False)
