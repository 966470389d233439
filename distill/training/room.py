"""Waiting until the cluster has room for the workers, in a way that can be cancelled.

Ray Train asks for room as well, but its request cannot be taken back, and would start the
workers of a cancelled job whenever there is room at last.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ray.util.placement_group import placement_group, remove_placement_group

from serve.errors import TrainingCancelled

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_SAY_AFTER_S = 10.0

_turn = threading.Lock()


@contextmanager
def my_turn(cancelled: Callable[[], bool]) -> Iterator[None]:
    """Be the only job of this process that takes room.

    Between seeing that there is room and having it, another could take it.

    Raises:
        TrainingCancelled: ``cancelled`` said so first.
    """
    while not _turn.acquire(timeout=_POLL_S):
        _stop_if(cancelled)
    try:
        yield
    finally:
        _turn.release()


def wait_for_room(bundles: Sequence[Mapping[str, float]], cancelled: Callable[[], bool]) -> None:
    """Return when the cluster has this much to spare; scaling it up is asked for.

    Args:
        bundles: What each worker needs, such as ``{"CPU": 1}``.
        cancelled: Asked meanwhile.

    Raises:
        TrainingCancelled: ``cancelled`` said so first.
    """
    asked = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    start, said = time.monotonic(), False
    try:
        _stop_if(cancelled)
        while not asked.wait(_POLL_S):
            _stop_if(cancelled)
            if not said and time.monotonic() - start > _SAY_AFTER_S:
                said = True
                logger.warning(
                    "Training waits for room: %d workers need %s each, more than the cluster "
                    "has free now.",
                    len(bundles),
                    " and ".join(f"{amount:g} {name}" for name, amount in bundles[0].items()),
                )
    finally:
        remove_placement_group(asked)


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise TrainingCancelled("Training was cancelled before its workers had started.")
