"""A stand-in for a paid model: a small HTTP server that speaks OpenAI's chat protocol.

Owns the protocol, the count of calls and running the server. There is no model behind it:
what it says is decided by the ``answer`` function it is given, which examples and tests
write for themselves. It reports token usage as one token per four characters, which is a
rule of thumb and not a tokenizer's count.

    POST /v1/chat/completions    GET /v1/models    GET /stats -> {"calls": n}
"""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

MODEL = "stand-in-teacher"

Answer = Callable[[list[dict]], str]


class TeacherRefuses(Exception):
    """Raised by an ``answer`` function to make the server reply with an HTTP error.

    Args:
        status: The HTTP status, such as 429 or 500.
        message: What the error body says.
        retry_after: Seconds for the ``Retry-After`` header; None leaves it out.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(status, message, retry_after)
        self.status = status
        self.message = message
        self.retry_after = retry_after


class StandInTeacher:
    """The ASGI application.

    Args:
        answer: Given the request's messages, returns the reply's text. It runs on the
            server's event loop, so it must be quick; latency is what ``latency_s`` is for.
        latency_s: Seconds that each answer is held back. Calls wait side by side.
    """

    def __init__(self, answer: Answer, latency_s: float = 0.0) -> None:
        self._answer = answer
        self._latency_s = latency_s
        self._ids = itertools.count(1)
        self.calls = 0
        """Requests for a completion so far, refused ones included."""
        self._app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/stats", self._stats),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _complete(self, request: Request) -> JSONResponse:
        self.calls += 1
        try:
            body = await request.json()
            messages, model = body["messages"], body.get("model", MODEL)
        except (ValueError, KeyError, TypeError, AttributeError):
            return _error(400, "expected a JSON object with messages")
        if body.get("stream"):
            return _error(400, "the stand-in teacher does not stream")
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        try:
            text = self._answer(messages)
        except TeacherRefuses as refusal:
            return _error(refusal.status, refusal.message, refusal.retry_after)
        return JSONResponse(_completion(f"stand-in-{next(self._ids)}", model, messages, text))

    async def _models(self, request: Request) -> JSONResponse:
        model = {"id": MODEL, "object": "model", "owned_by": "raydistill-examples"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _stats(self, request: Request) -> JSONResponse:
        return JSONResponse({"calls": self.calls})


def message_text(message: dict) -> str:
    """The text of a chat message, whose content is a string or a list of typed parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _completion(completion_id: str, model: str, messages: list[dict], text: str) -> dict:
    prompt_tokens = sum(len(message_text(message)) for message in messages) // 4
    completion_tokens = len(text) // 4
    message = {"role": "assistant", "content": text}
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _error(status: int, message: str, retry_after: float | None = None) -> JSONResponse:
    headers = None if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    error = {"message": message, "type": "stand_in_teacher", "code": status}
    return JSONResponse({"error": error}, status, headers)


class BackgroundServer:
    """A server running in a thread of this process; also a context manager.

    ``url`` is its root, as ``http://127.0.0.1:8100``; ``api_base`` is what an OpenAI
    client is given.
    """

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self.url = _url(listener)
        self.api_base = f"{self.url}/v1"
        self._server = server
        self._thread = threading.Thread(
            target=server.run, args=([listener],), name="stand-in-teacher", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop the server and wait until it has ended. Calls in flight get a second."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> "BackgroundServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve_in_background(app: StandInTeacher, port: int = 0) -> BackgroundServer:
    """Serve ``app`` on 127.0.0.1 from a thread; port 0 takes a free one."""
    return BackgroundServer(_server(app), _listen("127.0.0.1", port))


def serve_forever(app: StandInTeacher, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serve ``app`` until SIGINT or SIGTERM; prints ``{"url": ...}`` once it can be called."""
    listener = _listen(host, port)
    print(json.dumps({"url": _url(listener)}), flush=True)
    # uvicorn shuts down in order, then raises the signal that it was stopped with.
    with contextlib.suppress(KeyboardInterrupt):
        _server(app).run([listener])


def _server(app: StandInTeacher) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    )


def _listen(host: str, port: int) -> socket.socket:
    # Listening before the server's loop runs lets callers connect at once: they queue.
    return socket.create_server((host, port), backlog=2048)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"
