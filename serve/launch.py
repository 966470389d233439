"""Launched students: each an application of its own on Ray Serve, reached by its handle.

Owns that what the first launch starts the last kill stops. How callers find a launched student
is for ``handles`` and ``reach``; a student with HTTP in front is ``app``'s.
"""

import logging
import os
import threading
from contextlib import ExitStack
from typing import Any

import pydantic
import ray
import ray.serve

from serve import deployments, reach, running
from serve.deployments import Scale
from serve.errors import ConfigurationError
from serve.handles import APP_PREFIX, app_name, handle
from serve.models import check_model, full_name

logger = logging.getLogger(__name__)

_lock = threading.RLock()
_started = ExitStack()
"""Stops the Ray and the Serve that this process started for its students."""


def launch(student: str, **scale: Any) -> None:
    """Have the student answer on Ray; nothing more where it does already.

    Uses the Ray that this process is connected to, else ``RAY_ADDRESS``, else starts one.
    Whatever keeps it from answering, what was started for it is stopped.

    Args:
        student: A student directory, a Hugging Face model directory, or a hub id.
        scale: Fields of ``Scale``, such as ``max_replicas``.

    Raises:
        ConfigurationError: There is no such student, an option is wrong, or the cluster has
            too few CPUs or GPUs.
        StudentError: It is there but does not come to answer.
    """
    name = full_name(student)
    check_model(name)
    options = _scale(scale)
    with _lock, ExitStack() as failed:
        failed.callback(_stop_if_idle)
        running.connect(_started)
        if handle(name) is None:
            replicas = _num_replicas() + options.min_replicas
            cpus = deployments.STUDENT_CPUS
            deployments.check_room(replicas, options, cpus, "replicas of launched students")
            running.start_serve(_started, "Disabled")
            failed.callback(running.delete, app_name(name))
            running.deploy(deployments.student(options, name), app_name(name), None, name)
            logger.info("launched %s", name)
        failed.pop_all()
    # Whoever had it loaded into this process asks the launched one from now on.
    reach.forget(name)


def kill(student: str) -> None:
    """Free what the student's launch took; nothing where it was not launched."""
    name = full_name(student)
    with _lock, ExitStack() as connected:
        # An ended process may have left it on the cluster.
        if os.environ.get("RAY_ADDRESS"):
            running.connect(connected)
        if ray.is_initialized():
            running.delete(app_name(name))
            _stop_if_idle()
    reach.forget(name)


def _stop_if_idle() -> None:
    # Asking for the status would start another Ray in the place of one that has ended.
    if not ray.is_initialized() or not ray.serve.status().applications:
        _started.close()


def _num_replicas() -> int:
    """Replicas of the students that were launched before, by any process."""
    applications = ray.serve.status().applications
    return sum(
        sum(deployment.replica_states.values())
        for name, application in applications.items()
        if name.startswith(APP_PREFIX)
        for deployment in application.deployments.values()
    )


def _scale(given: dict[str, Any]) -> Scale:
    try:
        return Scale.model_validate(given)
    except pydantic.ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise ConfigurationError(
            f"launch_kwargs: {wrong}. Known are {', '.join(Scale.model_fields)}."
        ) from None
