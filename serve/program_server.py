"""The deployment that callers reach: the program over HTTP, in front of the student.

A plain class; ``app`` makes a Ray Serve deployment of it. What the routes do is in
``http_api`` and ``chat_api``; here they meet Ray's handle to the student.
"""

import os
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serve import http_api
from serve.engines.base import Overloaded
from serve.errors import ConfigurationError
from serve.handles import completing
from serve.program_runner import ProgramRunner
from serve.student import Manifest


class ProgramServer:
    """Serves the program of a student directory, if it has one, and the student at ``/v1``.

    Args:
        student: Handle to the ``StudentServer`` deployment.
        student_dir: The student directory.
        name: The student's model name.
        api_key_env: Environment variable that holds the key callers must send.
        concurrency: Most runs of a synchronous program at once.
    """

    def __init__(
        self,
        student: DeploymentHandle,
        student_dir: str,
        name: str,
        api_key_env: str | None,
        concurrency: int,
    ) -> None:
        self._student = student
        self._complete = completing(student)
        self._name = name
        self._api_key = read_api_key(api_key_env)
        self._runner = None
        if Manifest.load(student_dir).program is not None:
            self._runner = ProgramRunner(student_dir, self._complete, concurrency, name)

    async def __serve_build_asgi_app__(self) -> Any:
        """The routes; Ray Serve asks for them once, on the replica."""
        if self._runner is not None:
            await self._runner.start()
        return http_api.build(self._runner, self._complete, self._status, self._name, self._api_key)

    async def _status(self) -> dict[str, int]:
        try:
            return await self._student.status.remote()
        except BackPressureError as error:
            raise Overloaded(str(error)) from error


def read_api_key(variable: str | None) -> str | None:
    """The key that callers must send; it lives in the environment and nowhere else.

    Raises:
        ConfigurationError: The variable is named but not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigurationError(
            f"serve.api_key_env={variable}, but {variable} is not set. Set it before Ray starts, "
            "on every node that serves, or set serve.api_key_env to null."
        )
    return key
