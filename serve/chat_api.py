"""The student alone, behind the routes of OpenAI's chat API.

Owns their request, response and error shapes. Streaming is refused, in words.
"""

import asyncio
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from serve.engines.base import ChatRequest, ChatResult, Complete, RequestError


class ChatError(Exception):
    """A request that is refused, with the reply that says why."""

    def __init__(self, reply: JSONResponse) -> None:
        super().__init__(reply.body)
        self.reply = reply


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; its content is text, whole or in parts."""

    role: str
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message with its content as one string."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatCompletionRequest(BaseModel):
    """What a client sends. Fields of OpenAI's API that are not named here are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None

    def chat_request(self, choice: int) -> ChatRequest:
        """The request for one of the ``n`` choices."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return ChatRequest(
            messages=[message.plain() for message in self.messages],
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            # Choices of one seed would otherwise all be the same.
            seed=None if self.seed is None else self.seed + choice,
        )


def router(complete: Complete, name: str) -> APIRouter:
    """The routes, for a student of this name."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI-compatible"])
    created = int(time.time())

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The one model there is."""
        model = {"id": name, "object": "model", "created": created, "owned_by": "raydistill"}
        return {"object": "list", "data": [model]}

    @routes.post("/chat/completions")
    async def chat_completions(request: ChatCompletionRequest) -> dict[str, Any]:
        """Complete a chat."""
        if request.model != name:
            message = f"The model {request.model!r} does not exist; this endpoint serves {name!r}."
            raise ChatError(error(404, message, code="model_not_found", param="model"))
        if request.stream:
            message = "stream=true is not supported yet; send the request without it."
            raise ChatError(error(400, message, param="stream"))
        choices = range(request.n or 1)
        try:
            answers = (complete(request.chat_request(choice)) for choice in choices)
            results = await asyncio.gather(*answers)
        except RequestError as refusal:
            raise ChatError(error(400, str(refusal), param="messages")) from refusal
        return _completion(name, results)

    return routes


def error(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape."""
    body = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers)


def invalid(problem: Any) -> JSONResponse:
    """The reply to a body that does not validate."""
    first = problem.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    return error(400, f"{param}: {first['msg']}" if param else first["msg"], param=param or None)


async def on_chat_error(request: Request, problem: Any) -> Response:
    """FastAPI's handler of ``ChatError``."""
    reply: Response = problem.reply
    return reply


def _completion(name: str, results: list[ChatResult]) -> dict[str, Any]:
    prompt_tokens = results[0].prompt_tokens
    completion_tokens = sum(result.completion_tokens for result in results)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": None,
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
