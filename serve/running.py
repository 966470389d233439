"""Ray and Ray Serve, started where they are not there, and applications deployed to them.

Owns what is started and, by the exit stack that each function is given, that it is stopped
again. What is deployed is for ``app`` and ``launch``.
"""

import logging
from contextlib import ExitStack
from typing import Any

import ray
import ray.serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from serve import cluster
from serve.errors import StudentError


def connect(started: ExitStack) -> None:
    """Be connected to Ray: the one there is, else ``RAY_ADDRESS``, else one started here."""
    if not ray.is_initialized():
        started.callback(ray.shutdown)
        cluster.connect()


def start_serve(started: ExitStack, proxy_location: str, **http_options: Any) -> None:
    """Have Serve run. One that runs already keeps its own options.

    On a cluster of others it stays: whoever is about to deploy to it cannot be seen.
    """
    if not is_serving() and cluster.is_own():
        started.callback(_stop_serve)
    ray.serve.start(
        proxy_location=proxy_location,
        http_options=http_options or None,
        logging_config=_quiet(),
    )


def is_serving() -> bool:
    """Whether Serve runs on the connected cluster."""
    return ray.serve.context._get_global_client(raise_if_no_controller_running=False) is not None


def deploy(
    application: ray.serve.Application, name: str, route_prefix: str | None, student: str
) -> None:
    """Deploy an application; returns once its replicas run.

    Raises:
        StudentError: They do not come to run.
    """
    try:
        ray.serve.run(application, name=name, route_prefix=route_prefix, logging_config=_quiet())
    except (RuntimeError, RayServeException) as error:
        raise StudentError(f"{student}: cannot be served: {_reason(name, error)}") from error


def delete(name: str) -> None:
    """Delete an application, if it is there."""
    # Asking for the status would start another Ray in the place of one that has ended.
    if ray.is_initialized() and name in ray.serve.status().applications:
        ray.serve.delete(name)


def _stop_serve() -> None:
    # Somebody else may have deployed to it since, or have ended Ray.
    if ray.is_initialized() and not ray.serve.status().applications:
        ray.serve.shutdown()


def _reason(name: str, error: BaseException) -> str:
    """What kept the replicas from starting, where Serve knows; else the error itself."""
    application = ray.serve.status().applications.get(name)
    deployments = application.deployments.values() if application else ()
    messages = [deployment.message.strip() for deployment in deployments if deployment.message]
    # A message may hold the replica's traceback, whose last line names the error.
    return "; ".join(message.splitlines()[-1] for message in messages) or str(error)


def _quiet() -> LoggingConfig:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return LoggingConfig(log_level="WARNING", enable_access_log=False)
