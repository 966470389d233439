"""The Ray that a run uses: found, or started here, and left as it was found."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
import ray._private.state

from serve.errors import ConfigurationError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Be connected to Ray: ``RAY_ADDRESS``, a running cluster, or one started here.

    A connection that was there before stays; one made here is closed.

    Raises:
        ConfigurationError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    # Usage statistics would be a network call from a machine that may have no network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            # Says nothing to a cluster that is there already.
            include_dashboard=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )
    except ConnectionError as error:
        raise ConfigurationError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray answers there ({error}). "
            "Unset it to start Ray on this machine."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def capacity(resource: str) -> float:
    """What the cluster has of a resource, in use or not, or can scale up to."""
    present = float(ray.cluster_resources().get(resource, 0))
    # Ray Train asks the same: the largest cluster that the autoscaler may build, if any.
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return max(present, float(limits.get(resource, 0)))
