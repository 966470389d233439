"""How DSPy before 3.4 asks a student: through litellm, or an LM of its own class.

Owns litellm's handler for ``raydistill/<student>``, the LM class of a student, and the
translation of requests, responses and errors.
"""

import asyncio
import contextlib
import copy
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import dspy
import litellm

from serve.engines.base import ChatRequest, ChatResult, Overloaded, RequestError
from serve.errors import DistillError
from serve.reach import Reached, endpoint, reach, served_model


def register(provider: str) -> None:
    """Add the handler to litellm's map, unless it is there."""
    if all(known["provider"] != provider for known in litellm.custom_provider_map):
        litellm.custom_provider_map.append(
            {"provider": provider, "custom_handler": StudentHandler()}
        )


def student_lm(reached: Reached, model: str, **settings: Any) -> dspy.BaseLM:
    """An LM that asks what was reached; ``settings`` are ``dspy.LM``'s."""
    return StudentLM(reached, model, **settings)


def list_price(lm: dspy.BaseLM) -> tuple[float | None, float | None]:
    """USD per prompt token and per completion token, as litellm knows them."""
    try:
        info = litellm.get_model_info(lm.model)
    except Exception:
        # What litellm raises for a model that it does not know is a bare Exception.
        return None, None
    return info.get("input_cost_per_token"), info.get("output_cost_per_token")


class LMInvalidRequestError(litellm.exceptions.OpenAIError, ImportError):
    """A request that a student cannot answer, which litellm must not try again.

    It repeats whatever fails on an event loop, but for an ``ImportError``; elsewhere it
    repeats only what is an ``APIError`` as well.
    """

    def __init__(self, message: str) -> None:
        super().__init__()
        self.args = (message,)

    def __str__(self) -> str:
        return str(self.args[0])


class LMConfigurationError(LMInvalidRequestError):
    """A student that cannot be reached as things are set up."""


class StudentHandler(litellm.CustomLLM):
    """Answers for the models of the provider; over HTTP where an endpoint is named.

    litellm hands over everything by keyword; what is not named here is not looked at.
    """

    def completion(self, model: str, messages: list[Any], **call: Any) -> Any:  # type: ignore[override]
        """Answer one request."""
        with _as_lm_errors(model):
            forward = _forwarding(model, call)
            if forward is not None:
                return litellm.completion(messages=messages, **forward)
            reached = reach(model)
            requests = _chat_requests(messages, call["optional_params"])
            return _model_response(model, [reached.answer(request) for request in requests])

    async def acompletion(self, model: str, messages: list[Any], **call: Any) -> Any:  # type: ignore[override]
        """Answer one request, on an event loop."""
        with _as_lm_errors(model):
            forward = await asyncio.to_thread(_forwarding, model, call)
            if forward is not None:
                return await litellm.acompletion(messages=messages, **forward)
            # The first call of a student loads it.
            reached = await asyncio.to_thread(reach, model)
            requests = _chat_requests(messages, call["optional_params"])
            results = await asyncio.gather(*(reached.aanswer(each) for each in requests))
            return _model_response(model, results)

    def streaming(self, **call: Any) -> Iterator[Any]:  # type: ignore[override]
        """The whole answer, as a stream of it."""
        yield _chunk(self.completion(**call))

    async def astreaming(self, **call: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        """The whole answer, as a stream of it."""
        yield _chunk(await self.acompletion(**call))


def _forwarding(model: str, call: dict[str, Any]) -> dict[str, Any] | None:
    """What to ask litellm for instead where an endpoint is named."""
    api_base, api_key = endpoint(call.get("api_base"), call.get("api_key"))
    if api_base is None:
        return None
    options = {name: value for name, value in call["optional_params"].items() if name != "stream"}
    return {
        **options,
        "model": f"openai/{served_model(api_base, api_key, model)}",
        "api_base": api_base,
        "api_key": api_key or "none",
    }


class StudentLM(dspy.BaseLM):
    """The LM of a student that was reached."""

    def __init__(self, reached: Reached, model: str, num_retries: int = 0, **settings: Any) -> None:
        # BaseLM has limits of its own; the student's is in its manifest.
        limits = {"temperature": None, "max_tokens": None}
        super().__init__(model=model, cache=False, **{**limits, **settings})
        self.num_retries = num_retries
        self._reached = reached

    def __deepcopy__(self, memo: dict[int, Any]) -> "StudentLM":
        # LMs are copied deeply here; what completes the requests can only be shared.
        twin = copy.copy(self)
        twin.history, twin.kwargs = [], dict(self.kwargs)
        return twin

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """Answer from another thread than the loop's, blocking it."""
        requests = self._requests(prompt, messages, kwargs)
        return _plain_response(self.model, [self._reached.answer(each) for each in requests])

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """Answer on any loop."""
        requests = self._requests(prompt, messages, kwargs)
        results = await asyncio.gather(*(self._reached.aanswer(each) for each in requests))
        return _plain_response(self.model, results)

    def _requests(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> list[ChatRequest]:
        messages = messages or [{"role": "user", "content": prompt}]
        return _chat_requests(messages, {**self.kwargs, **kwargs})


@contextlib.contextmanager
def _as_lm_errors(model: str) -> Iterator[None]:
    """Raise errors as litellm's, which say what is worth a retry."""
    try:
        yield
    except (RequestError, litellm.BadRequestError) as error:
        raise LMInvalidRequestError(str(error)) from error
    except Overloaded as error:
        raise litellm.RateLimitError(str(error), "raydistill", model) from error
    except DistillError as error:
        raise LMConfigurationError(str(error)) from error
    except OSError as error:
        raise litellm.APIConnectionError(str(error), "raydistill", model) from error


def _chat_requests(messages: list[Any], options: dict[str, Any]) -> list[ChatRequest]:
    if options.get("tools"):
        raise RequestError("a student takes no tools; describe them in the prompt.")
    stop = options.get("stop")
    top_p, seed = options.get("top_p"), options.get("seed")
    return [
        ChatRequest(
            messages=[
                {"role": message["role"], "content": _text(message["content"])}
                for message in messages
            ],
            max_tokens=options.get("max_tokens") or options.get("max_completion_tokens"),
            temperature=options.get("temperature") or 0.0,
            top_p=1.0 if top_p is None else top_p,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            # Choices of one seed would otherwise all be the same.
            seed=None if seed is None else seed + choice,
        )
        for choice in range(options.get("n") or 1)
    ]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    other = {part["type"] for part in content if part["type"] != "text"}
    if other:
        raise RequestError(f"a message holds {', '.join(sorted(other))}; a student takes text.")
    return "".join(part["text"] for part in content)


def _usage(results: Sequence[ChatResult]) -> dict[str, Any]:
    prompt_tokens = results[0].prompt_tokens
    completion_tokens = sum(result.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _choices(results: Sequence[ChatResult]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "finish_reason": result.finish_reason,
            "message": {"role": "assistant", "content": result.text},
        }
        for index, result in enumerate(results)
    ]


def _model_response(model: str, results: Sequence[ChatResult]) -> litellm.ModelResponse:
    return litellm.ModelResponse(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        model=model,
        choices=_choices(results),
        usage=litellm.Usage(**_usage(results)),
    )


def _plain_response(model: str, results: Sequence[ChatResult]) -> SimpleNamespace:
    choices = [
        SimpleNamespace(**{**choice, "message": SimpleNamespace(**choice["message"])})
        for choice in _choices(results)
    ]
    return SimpleNamespace(
        id=f"chatcmpl-{uuid.uuid4().hex}", model=model, choices=choices, usage=_usage(results)
    )


def _chunk(response: Any) -> dict[str, Any]:
    choice = response.choices[0]
    return {
        "text": choice.message.content,
        "is_finished": True,
        "finish_reason": choice.finish_reason,
        "index": 0,
        "tool_use": None,
        "usage": dict(response.usage),
    }
