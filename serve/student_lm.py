"""A student as DSPy sees it: an LM whose calls go to whatever completes chats.

Owns the translation between DSPy's LM calls and ``ChatRequest``. It keeps no cache and
retries nothing: a student is near, cheap and the same tomorrow.
"""

import asyncio
import copy
import uuid
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import dspy

from serve.engines.base import ChatRequest, ChatResult

Complete = Callable[[ChatRequest], Awaitable[ChatResult]]


class StudentLM(dspy.BaseLM):
    """The LM to put into ``dspy.context(lm=...)``.

    Args:
        complete: Answers one request, on ``loop``; such as ``Batcher.complete``.
        loop: The running event loop that ``complete`` belongs to. Programs that run in
            other threads are answered through it.
        model: The name that usage and histories show.
    """

    def __init__(
        self, complete: Complete, loop: asyncio.AbstractEventLoop, model: str = "student"
    ) -> None:
        # Some versions of DSPy have limits of their own; the student's is in its manifest.
        super().__init__(model=model, cache=False, temperature=None, max_tokens=None)
        self.num_retries = 0
        self._complete = complete
        self._loop = loop

    def __deepcopy__(self, memo: dict[int, Any]) -> "StudentLM":
        # DSPy 3.1 copies LMs deeply; what completes the requests can only be shared.
        twin = copy.copy(self)
        twin.history, twin.kwargs = [], dict(self.kwargs)
        return twin

    def forward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """Answer from another thread than the loop's, blocking it.

        Raises:
            RuntimeError: This is the loop's own thread, which would wait for itself.
        """
        if asyncio._get_running_loop() is self._loop:
            raise RuntimeError(
                "a predictor was called synchronously from aforward, where it would wait for "
                "itself for ever. Write `await self.predictor.acall(...)` there."
            )
        answer = self._answer(prompt, messages, kwargs)
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result()

    async def aforward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """Answer on any loop."""
        answer = self._answer(prompt, messages, kwargs)
        if asyncio.get_running_loop() is self._loop:
            return await answer
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(answer, self._loop))

    async def _answer(
        self, prompt: str | None, messages: list[dict[str, Any]] | None, kwargs: dict[str, Any]
    ) -> Any:
        given = {key: value for key, value in kwargs.items() if value is not None}
        options = {**self.kwargs, **given}
        request = ChatRequest(
            messages=messages or [{"role": "user", "content": prompt}],
            max_tokens=options.get("max_tokens"),
            temperature=options.get("temperature") or 0.0,
            top_p=options.get("top_p") or 1.0,
            stop=_as_tuple(options.get("stop")),
            seed=options.get("seed"),
        )
        count = options.get("n") or 1
        results = await asyncio.gather(*(self._complete(request) for _ in range(count)))
        return _response(self.model, results)


def student_adapter(adapter: dspy.Adapter) -> dspy.Adapter:
    """The adapter without its second try through JSON.

    A student has learned one layout of prompt; another one can only be answered worse.
    """
    adapter = copy.copy(adapter)
    if hasattr(adapter, "use_json_adapter_fallback"):
        adapter.use_json_adapter_fallback = False
    return adapter


def _as_tuple(stop: Any) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _response(model: str, results: list[ChatResult]) -> SimpleNamespace:
    prompt_tokens = results[0].prompt_tokens
    completion_tokens = sum(result.completion_tokens for result in results)
    return SimpleNamespace(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        model=model,
        choices=[
            SimpleNamespace(
                index=index,
                finish_reason=result.finish_reason,
                message=SimpleNamespace(role="assistant", content=result.text),
            )
            for index, result in enumerate(results)
        ],
        usage={
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    )
