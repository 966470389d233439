"""How DSPy 3.4 and later ask a student: engines from canonical requests to responses.

Owns the provider that DSPy routes ``raydistill/<student>`` to, the engines behind a student's
own LM, and the translation of requests, responses and errors. Nothing here that DSPy 3.5
removes.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import dspy
from dspy import lm15
from dspy.clients.capabilities import resolve
from dspy.clients.model_metadata import model_info, rate
from dspy.utils.exceptions import LMError

from serve.engines.base import ChatRequest, ChatResult, Overloaded, RequestError
from serve.errors import DistillError
from serve.reach import Reached, endpoint, reach, served_model

# DSPy asks for an address of each provider; a student without one answers in this process.
NOWHERE = "http://raydistill.invalid/v1"
NO_KEY = "none"
DEFAULT_URL = lm15.OpenAIChatLM(api_key=NO_KEY, transport=None).base_url
RETRY_AFTER_S = 1.0


def register(provider: str) -> None:
    """Declare the provider; DSPy takes the same declaration any number of times."""
    access = lm15.AccessPolicy(provider=provider, env_keys=(), base_url=NOWHERE)
    definition = lm15.ProviderDefinition.chat(
        access, compat=lm15.OpenAIChatCompat(), placeholder_key=NO_KEY
    )
    lm15.register_provider(
        dataclasses.replace(definition, adapter=StudentChat, async_adapter=AsyncStudentChat),
        # No namespaces: whatever DSPy knows of others' models and prices, it is not ours.
        supports=lm15.ModelSupport(function_calling=False, reasoning=False, response_schema=False),
    )


def student_lm(reached: Reached, model: str, **settings: Any) -> dspy.BaseLM:
    """An LM that asks what was reached; ``settings`` are ``dspy.LM``'s."""
    return dspy.LM(
        model,
        engine=StudentEngine(reached),
        async_engine=AsyncStudentEngine(reached),
        cache=False,
        **{"num_retries": 0, **settings},
    )


def list_price(lm: dspy.BaseLM) -> tuple[float | None, float | None]:
    """USD per prompt token and per completion token, as DSPy knows them."""
    try:
        route = resolve(lm)
    except (lm15.LM15Error, LMError):
        return None, None  # A model that DSPy leaves to litellm, or does not know.
    info = model_info(route.provider, route.model)
    return rate(info, "input_cost_per_token"), rate(info, "output_cost_per_token")


class StudentChat(lm15.OpenAIChatLM):
    """Answers for the models of the provider; over HTTP where an endpoint is named."""

    def __post_init__(self) -> None:
        _set_endpoint(self)
        super().__post_init__()

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request."""
        with _as_lm_errors():
            if self.base_url == NOWHERE:
                return _response(request, reach(request.model).answer(_chat_request(request)))
            request = _for_endpoint(self, request)
        return super().complete(request)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """The whole answer, as a stream of it."""
        yield from lm15.response_to_events(self.complete(request))


class AsyncStudentChat(lm15.AsyncOpenAIChatLM):
    """The same, for callers on an event loop."""

    def __post_init__(self) -> None:
        _set_endpoint(self)
        super().__post_init__()

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request."""
        with _as_lm_errors():
            if self.base_url == NOWHERE:
                # The first call of a student loads it.
                reached = await asyncio.to_thread(reach, request.model)
                return _response(request, await reached.aanswer(_chat_request(request)))
            request = await asyncio.to_thread(_for_endpoint, self, request)
        return await super().complete(request)

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """The whole answer, as a stream of it."""
        for event in lm15.response_to_events(await self.complete(request)):
            yield event


def _set_endpoint(chat: Any) -> None:
    """Take address and key from the environment where the LM names none.

    They never enter the LM's own settings, which are saved with a program.
    """
    given = chat.base_url if chat.base_url not in (NOWHERE, DEFAULT_URL) else None
    key = chat.api_key if chat.api_key != NO_KEY else None
    api_base, api_key = endpoint(given, key)
    chat.base_url, chat.api_key = api_base or NOWHERE, api_key or NO_KEY


def _for_endpoint(chat: Any, request: lm15.Request) -> lm15.Request:
    try:
        key = chat.api_key if isinstance(chat.api_key, str) else None
        return dataclasses.replace(request, model=served_model(chat.base_url, key, request.model))
    except OSError as error:
        raise lm15.TransportError(f"{chat.base_url}: does not answer ({error})") from error


class StudentEngine:
    """What a student's LM asks from a thread."""

    def __init__(self, reached: Reached) -> None:
        self._reached = reached

    def __deepcopy__(self, memo: dict[int, Any]) -> "StudentEngine":
        # Copies of an LM ask the same student, which has no copy.
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request."""
        with _as_lm_errors():
            return _response(request, self._reached.answer(_chat_request(request)))

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """The whole answer, as a stream of it."""
        yield from lm15.response_to_events(self.complete(request))


class AsyncStudentEngine:
    """What a student's LM asks on an event loop."""

    def __init__(self, reached: Reached) -> None:
        self._reached = reached

    def __deepcopy__(self, memo: dict[int, Any]) -> "AsyncStudentEngine":
        # As above.
        return self

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request."""
        with _as_lm_errors():
            return _response(request, await self._reached.aanswer(_chat_request(request)))

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """The whole answer, as a stream of it."""
        for event in lm15.response_to_events(await self.complete(request)):
            yield event


@contextlib.contextmanager
def _as_lm_errors() -> Iterator[None]:
    """Raise errors as DSPy's, which says what is worth a retry."""
    try:
        yield
    except RequestError as error:
        raise lm15.InvalidRequestError(str(error)) from error
    except Overloaded as error:
        raise lm15.RateLimitError(str(error), retry_after=RETRY_AFTER_S) from error
    except DistillError as error:
        raise lm15.ConfigurationError(str(error)) from error


def _chat_request(request: lm15.Request) -> ChatRequest:
    if request.tools:
        raise RequestError("a student takes no tools; describe them in the prompt.")
    messages = [] if request.system is None else [("system", _text(request.system))]
    messages += [(message.role, _text(message.parts)) for message in request.messages]
    config = request.config
    return ChatRequest(
        # DSPy calls a system message that comes later the developer's.
        messages=[
            {"role": "system" if role == "developer" else role, "content": text}
            for role, text in messages
        ],
        max_tokens=config.max_tokens,
        temperature=config.temperature or 0.0,
        top_p=1.0 if config.top_p is None else config.top_p,
        stop=config.stop,
        seed=config.seed,
    )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    other = {part.type for part in content if not isinstance(part, lm15.TextPart)}
    if other:
        raise RequestError(f"a message holds {', '.join(sorted(other))}; a student takes text.")
    return "".join(part.text for part in content)


def _response(request: lm15.Request, result: ChatResult) -> lm15.Response:
    return lm15.Response(
        id=None,
        model=request.model,
        message=lm15.Message.assistant([lm15.TextPart(result.text)]),
        finish_reason=result.finish_reason,
        usage=lm15.Usage(
            input_tokens=result.prompt_tokens,
            output_tokens=result.completion_tokens,
            total_tokens=result.prompt_tokens + result.completion_tokens,
        ),
    )
