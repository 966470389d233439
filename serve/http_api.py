"""The HTTP application: ``/predict`` and ``/healthz``, authentication and errors.

Knows nothing of Ray: it is given what runs the program and what completes chats. The
OpenAI-compatible routes are in ``chat_api``.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from dspy.utils.exceptions import AdapterParseError
from fastapi import FastAPI, Request
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import chat_api
from serve.engines.base import Complete, Overloaded, RequestError
from serve.program_runner import ProgramRunner

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 10
MAX_MESSAGE_CHARS = 1_000
TRY_AGAIN = "The student is overloaded; try again."
RETRY = {"Retry-After": "1"}


class ErrorDetail(BaseModel):
    """What went wrong: a name for programs, a message for people."""

    error: str
    message: str


class ErrorReply(BaseModel):
    """The body of a failed request."""

    detail: ErrorDetail


def build(
    runner: ProgramRunner | None,
    complete: Complete,
    status: Callable[[], Awaitable[dict[str, Any]]],
    name: str,
    api_key: str | None,
) -> FastAPI:
    """The application.

    Args:
        runner: Runs the program; None for a student without one, which has no ``/predict``.
        complete: Completes one chat; raises ``Overloaded`` where there is no room.
        status: What ``/healthz`` says of the student; raises if it does not answer.
        name: The student's model name.
        api_key: What callers must send as a bearer token; None lets everyone in.
    """
    app = FastAPI(title=f"{name} (raydistill)")
    if runner:
        _add_predict(app, runner)
    _add_healthz(app, status)
    app.include_router(chat_api.router(complete, name))
    app.add_exception_handler(chat_api.ChatError, chat_api.on_chat_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Overloaded, _on_overloaded)
    app.add_exception_handler(Exception, _on_error)
    if api_key:
        app.add_middleware(RequireKey, api_key=api_key)
    return app


def _add_predict(app: FastAPI, runner: ProgramRunner) -> None:
    inputs_form: Any = runner.input_form
    replies: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": text}
        for status, text in (
            (500, "The program failed."),
            (502, "The student's answer does not parse."),
            (503, "Overloaded; try again."),
        )
    }

    @app.post("/predict", response_model=runner.output_form, responses=replies)
    async def predict(inputs: inputs_form) -> Response:
        """Run the program on these inputs."""
        try:
            return JSONResponse(await runner.run(inputs.values()))
        # The program is the user's code and may raise anything.
        except Exception as error:
            return _failure(error)


def _add_healthz(app: FastAPI, status: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the program and the student answer."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                return JSONResponse({"status": "ok", "student": await status()})
        except Overloaded:
            # Alive: taking a busy endpoint out of service would only burden the others.
            return JSONResponse({"status": "busy"})
        # Whatever it is that keeps the student from answering, it does not answer.
        except Exception as error:
            logger.warning("the student does not answer: %r", error)
            return JSONResponse({"status": "unavailable", "student": type(error).__name__}, 503)


def _failure(error: Exception) -> JSONResponse:
    """The reply to a failed run, by what is at the root of it."""
    causes = list(_chain(error))
    if any(isinstance(cause, Overloaded) for cause in causes):
        return _reply(503, "overloaded", TRY_AGAIN, RETRY)
    rejected = next((cause for cause in causes if isinstance(cause, RequestError)), None)
    if rejected:
        return _reply(422, "unanswerable", str(rejected))
    if any(isinstance(cause, AdapterParseError) for cause in causes):
        return _reply(502, "unparseable_answer", str(error))
    logger.exception("the program failed", exc_info=error)
    return _reply(500, "program_failed", f"{type(error).__name__}: {error}")


def _reply(
    status: int, error: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    detail = ErrorDetail(error=error, message=message[:MAX_MESSAGE_CHARS])
    return JSONResponse(ErrorReply(detail=detail).model_dump(), status, headers)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


async def _on_invalid(request: Request, error: Any) -> Response:
    if request.url.path.startswith("/v1/"):
        return chat_api.invalid(error)
    return await request_validation_exception_handler(request, error)


async def _on_overloaded(request: Request, error: Exception) -> Response:
    if request.url.path.startswith("/v1/"):
        return chat_api.error(503, TRY_AGAIN, "server_error", "overloaded", headers=RETRY)
    return _reply(503, "overloaded", TRY_AGAIN, RETRY)


async def _on_error(request: Request, error: Exception) -> Response:
    message = f"{request.url.path} failed ({type(error).__name__}); the logs say more."
    if request.url.path.startswith("/v1/"):
        return chat_api.error(500, message, "server_error")
    return _reply(500, "internal", message)


class RequireKey:
    """Middleware: everything but ``/healthz`` needs the key as a bearer token."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/healthz" or self._knows(scope):
            await self._app(scope, receive, send)
            return
        message = "Send the API key as `Authorization: Bearer <key>`."
        if scope["path"].startswith("/v1/"):
            reply = chat_api.error(401, message, "authentication_error", code="invalid_api_key")
        else:
            reply = _reply(401, "unauthorized", message)
        reply.headers["WWW-Authenticate"] = "Bearer"
        await reply(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
