"""The Ray that is used: found or started, and whether it has room.

Owns the connection's settings and the cluster's size. What is deployed is for ``app``.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping

import ray
import ray._private.state
import ray._private.worker

from serve.errors import ConfigurationError


def connect(*, log_to_driver: bool = False) -> None:
    """Connect to ``RAY_ADDRESS``, else to a running cluster, else to one started here.

    Args:
        log_to_driver: Print here what the workers print.

    Raises:
        ConfigurationError: ``RAY_ADDRESS`` names a cluster that does not answer.
        KeyboardInterrupt: The process was told to end meanwhile.
    """
    # Workers look for the user's program where this process does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # Usage statistics would be a network call from a machine that may have no network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # Without a dashboard, where one is started; a cluster that is there has its own.
        ray.init(include_dashboard=False, log_to_driver=log_to_driver, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigurationError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray answers there ({error}). "
            "Unset it to start Ray on this machine."
        ) from error
    except SystemExit:
        # Ray puts its own handler of SIGTERM in the place of the caller's.
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def is_own() -> bool:
    """Whether this process has started the cluster that it is connected to."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def capacity(resource: str) -> float:
    """What the cluster has of a resource, in use or not, or can scale up to."""
    present = float(ray.cluster_resources().get(resource, 0))
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return max(present, float(limits.get(resource, 0)))


def check_room(needed: Mapping[str, float], setting: str) -> None:
    """See that the cluster has what is needed; Serve would wait for it for ever.

    Args:
        needed: Amount of each resource, such as ``{"CPU": 1.5}``.
        setting: What asks for it, as ``serve.replicas.min=1``.

    Raises:
        ConfigurationError: It has less.
    """
    for resource, amount in needed.items():
        found = capacity(resource)
        if found < amount:
            raise ConfigurationError(
                f"{setting} needs {amount:g} {resource}s; the cluster has {found:g}. "
                f"Lower {setting.partition('=')[0]} or add {resource} nodes to the cluster."
            )
