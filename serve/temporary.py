"""Models that answer on Ray Serve for as long as one job needs them, such as a teacher.

Owns their applications: one for each Ray job and model, deleted at the end of the block that
needs it, or by the next job where its own died first. Two jobs never share one, so neither can
take it from the other. Launched students, which outlive their job, are ``launch``'s.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator

import ray
import ray._private.state
import ray.serve
from ray.serve.exceptions import RayServeException

from serve import deployments, running
from serve.deployments import Scale
from serve.engines.base import ChatRequest, ChatResult, Complete
from serve.handles import Gone, completing

APP_PREFIX = "raydistill-job-"


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
        started.callback(running.delete, app_name(model))
        running.deploy(deployments.student(scale, model), app_name(model), None, model)
        yield


def sweep() -> None:
    """Delete what jobs that have ended left behind on the connected cluster."""
    if not running.is_serving():
        return
    alive = {job["JobID"] for job in ray._private.state.jobs() if not job["IsDead"]}
    for name in ray.serve.status().applications:
        if name.startswith(APP_PREFIX) and name.split("-")[2] not in alive:
            running.delete(name)


def app_name(model: str) -> str:
    """The application of a model in this process's job."""
    job = ray.get_runtime_context().get_job_id()
    return f"{APP_PREFIX}{job}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def complete(model: str) -> Complete:
    """A function that asks the model served in this job; it may be made before that is."""
    asked: Complete | None = None

    async def ask(request: ChatRequest) -> ChatResult:
        nonlocal asked
        if asked is None:
            asked = await asyncio.to_thread(_find, model)
        try:
            return await asked(request)
        except Gone:
            # The next block that serves it makes a new one.
            asked = None
            raise

    return ask


def _find(model: str) -> Complete:
    try:
        return completing(ray.serve.get_app_handle(app_name(model)))
    except RayServeException as error:
        raise Gone(f"{model} is not served in this job: {error}") from error
