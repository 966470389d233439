"""Models that answer on Ray Serve for as long as one job needs them, such as a teacher.

Owns their applications: one for each Ray job and model, deleted at the end of the block that
needs it, or by the next job where its own died first. Two jobs never share one, so neither can
take it from the other. Launched students, which outlive their job, are ``launch``'s.
"""

import contextlib
from collections.abc import Iterator

import ray._private.state
import ray.serve

from serve import deployments, running
from serve.deployments import Scale
from serve.handles import JOB_APP_PREFIX, job_app_name


@contextlib.contextmanager
def served(model: str, scale: Scale) -> Iterator[None]:
    """Have a model answer this job, from its first replica's health to the end of the block.

    Args:
        model: Its full name.
        scale: How many replicas, and of what size.

    Raises:
        StudentError: It does not come to answer.
    """
    with contextlib.ExitStack() as started:
        running.connect(started)
        sweep()
        running.start_serve(started, "Disabled")
        started.callback(running.delete, job_app_name(model))
        running.deploy(deployments.student(scale, model), job_app_name(model), None, model)
        yield


def sweep() -> None:
    """Delete what jobs that have ended left behind on the connected cluster."""
    if not running.is_serving():
        return
    alive = {job["JobID"] for job in ray._private.state.jobs() if not job["IsDead"]}
    for name in ray.serve.status().applications:
        if name.startswith(JOB_APP_PREFIX) and name.split("-")[2] not in alive:
            running.delete(name)
