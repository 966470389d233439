"""Where a student answers, seen from this process.

Owns the choice between a student that was launched on Ray and one that is loaded into this
process, the event loop on which its answers are made, and what another endpoint calls its
model. How DSPy asks is for ``dspy_lm``, how students are launched for ``launch``.
"""

import asyncio
import functools
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass

from serve.batcher import Batcher
from serve.engines.base import ChatRequest, ChatResult, Complete
from serve.errors import ConfigurationError
from serve.models import full_name, load_engine

API_BASE = "RAYDISTILL_API_BASE"
API_KEY = "RAYDISTILL_API_KEY"
LIST_TIMEOUT_S = 30


@dataclass(frozen=True)
class Reached:
    """What completes chats, and the loop that it belongs to."""

    complete: Complete
    loop: asyncio.AbstractEventLoop

    def answer(self, request: ChatRequest) -> ChatResult:
        """Answer from another thread than the loop's, blocking it.

        Raises:
            RuntimeError: This is the loop's own thread, which would wait for itself.
        """
        if asyncio._get_running_loop() is self.loop:
            raise RuntimeError(
                "a predictor was called synchronously from aforward, where it would wait for "
                "itself for ever. Write `await self.predictor.acall(...)` there."
            )
        return asyncio.run_coroutine_threadsafe(self._completed(request), self.loop).result()

    async def aanswer(self, request: ChatRequest) -> ChatResult:
        """Answer on any loop."""
        if asyncio.get_running_loop() is self.loop:
            return await self.complete(request)
        answer = asyncio.run_coroutine_threadsafe(self._completed(request), self.loop)
        return await asyncio.wrap_future(answer)

    async def _completed(self, request: ChatRequest) -> ChatResult:
        return await self.complete(request)


_reached: dict[str, Reached] = {}
_lock = threading.RLock()


def reach(student: str) -> Reached:
    """Where the student answers: where it was launched, else in this process.

    Loading it blocks; it happens once, however many LMs and threads ask.

    Raises:
        ConfigurationError: There is no such student.
        StudentError: It is there but cannot be loaded.
    """
    name = full_name(student)
    # A student that is being loaded must not hold up those that are there.
    found = _reached.get(name)
    if found:
        return found
    with _lock:
        if name not in _reached:
            _reached[name] = _launched(name) or _loaded(name)
        return _reached[name]


def forget(student: str) -> None:
    """Look for the student anew at its next call; what was loaded of it is let go."""
    with _lock:
        _reached.pop(full_name(student), None)


def in_this_job(model: str) -> Reached:
    """A model that is served for this Ray job, looked for at the first request."""
    from serve.handles import completing_in_job

    return Reached(completing_in_job(model), _loop())


def _launched(student: str) -> Reached | None:
    # What is connected to Ray has imported it.
    if "ray" not in sys.modules:
        return None
    from serve.handles import Gone, completing, handle

    launched = handle(student)
    if launched is None:
        return None
    ask = completing(launched)

    async def complete(request: ChatRequest) -> ChatResult:
        try:
            return await ask(request)
        except Gone:
            # Another process has killed it; the next try finds where it answers now.
            forget(student)
            raise

    return Reached(complete, _loop())


def _loaded(student: str) -> Reached:
    return Reached(Batcher(load_engine(student)).complete, _loop())


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="students", daemon=True).start()
    return loop


def served_model(api_base: str, api_key: str | None, student: str) -> str:
    """What an OpenAI-compatible endpoint calls the student.

    Raises:
        ConfigurationError: It serves several models, none of them by the student's name.
        OSError: It does not answer.
    """
    names = _served_models(api_base.rstrip("/"), api_key)
    if student in names:
        return student
    if len(names) != 1:
        raise ConfigurationError(
            f"{api_base} serves {', '.join(names) or 'no model'}; expected one model, or one "
            f"that is named {student}. Give the api_base of the student's own endpoint."
        )
    return names[0]


@functools.lru_cache
def _served_models(api_base: str, api_key: str | None) -> tuple[str, ...]:
    request = urllib.request.Request(f"{api_base}/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=LIST_TIMEOUT_S) as reply:
            listed = json.load(reply)
    except urllib.error.HTTPError as error:
        raise ConfigurationError(
            f"{api_base}/models answers {error.code} {error.reason}; expected a list of models. "
            f"Give the address of `raydistill serve` with /v1 at its end, and its key in {API_KEY}."
        ) from error
    return tuple(model["id"] for model in listed["data"])


def endpoint(api_base: str | None, api_key: str | None) -> tuple[str | None, str | None]:
    """Address and key of the endpoint to ask, from what was given or the environment."""
    return api_base or os.environ.get(API_BASE), api_key or os.environ.get(API_KEY)
