"""The Ray that a run uses: connected for as long as the run lasts, left as it was found."""

import contextlib
import os
from collections.abc import Iterator

import ray

from serve.cluster import connect

WORKERS_START_S = 600
REPORTS_EVERY_S = 0.2


@contextlib.contextmanager
def connected(*, log_to_driver: bool = False) -> Iterator[None]:
    """Be connected to Ray: ``RAY_ADDRESS``, a running cluster, or one started here.

    A connection that was there before stays; one made here is closed.

    Args:
        log_to_driver: Print here what the workers print.

    Raises:
        ConfigurationError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    # Ray Train gives up after a minute, which nodes that have to be started first may need.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(WORKERS_START_S))
    # It looks for what workers report every two seconds, for which a small student's epochs wait.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(REPORTS_EVERY_S))
    if ray.is_initialized():
        yield
        return
    connect(log_to_driver=log_to_driver)
    try:
        yield
    finally:
        ray.shutdown()
