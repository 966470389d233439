"""Models on Ray Serve as seen by those who ask them: by name, through Ray's handle.

Owns the applications' names, of launched students and of models that serve one job, and the
translation of what Ray raises into what the request itself has run into. Launching is ``launch``,
serving for a job ``temporary``.
"""

import asyncio
import hashlib

import ray
import ray.serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle

from serve.engines.base import ChatRequest, ChatResult, Complete, Overloaded, RequestError
from serve.models import full_name

APP_PREFIX = "raydistill-student-"
JOB_APP_PREFIX = "raydistill-job-"


class Gone(Overloaded):
    """The student was launched and no longer is."""


def app_name(student: str) -> str:
    """The application of a student, by the student's full name."""
    return APP_PREFIX + hashlib.sha256(student.encode()).hexdigest()[:16]


def handle(student: str) -> DeploymentHandle | None:
    """The handle to a launched student; None if it is not, as seen from this process."""
    if not ray.is_initialized():
        return None
    try:
        return ray.serve.get_app_handle(app_name(full_name(student)))
    except RayServeException:
        return None


def completing(student: DeploymentHandle) -> Complete:
    """A function that answers requests through a handle to ``StudentServer``."""

    async def complete(request: ChatRequest) -> ChatResult:
        try:
            return await student.complete.remote(request)
        except BackPressureError as error:
            raise Overloaded(str(error)) from error
        except DeploymentUnavailableError as error:
            raise Gone(f"{student.app_name} does not run any more; try again.") from error
        except RayActorError as error:
            # Serve puts another one in its place.
            raise Overloaded(f"A replica of {student.app_name} died; try again.") from error
        except RayTaskError as error:
            # Its own text is the replica's whole traceback.
            if isinstance(error.cause, RequestError):
                raise error.cause from None
            raise

    return complete


def job_app_name(model: str) -> str:
    """The application of a model in this process's job."""
    job = ray.get_runtime_context().get_job_id()
    return f"{JOB_APP_PREFIX}{job}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def completing_in_job(model: str) -> Complete:
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
        return completing(ray.serve.get_app_handle(job_app_name(model)))
    except RayServeException as error:
        raise Gone(f"{model} is not served in this job: {error}") from error
