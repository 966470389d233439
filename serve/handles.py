"""Ray's handle to a launched student, as something that completes chats.

Owns the translation of what Ray raises into what the request itself has run into.
"""

from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.engines.base import ChatRequest, ChatResult, Complete, Overloaded, RequestError


class Gone(Overloaded):
    """The student was launched and no longer is."""


def completing(student: DeploymentHandle) -> Complete:
    """A function that answers requests through a handle to ``StudentServer``."""

    async def complete(request: ChatRequest) -> ChatResult:
        try:
            return await student.complete.remote(request)
        except BackPressureError as error:
            raise Overloaded(str(error)) from error
        except DeploymentUnavailableError as error:
            raise Gone(f"{student.app_name} does not run any more; try again.") from error
        except RayTaskError as error:
            # Its own text is the replica's whole traceback.
            if isinstance(error.cause, RequestError):
                raise error.cause from None
            raise

    return complete
