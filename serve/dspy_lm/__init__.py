"""All contact with DSPy's LM layer, whose two ends differ between DSPy 3.1 and 3.4.

Owns the names ``raydistill/<student>``, students as DSPy's LMs, and what is read off any LM:
its usage, price and identity. ``engines`` is how DSPy 3.4 asks a student, ``handler`` how versions
before it do; ``governed`` takes an LM's calls over, ``failures`` reads its errors. Importing
this module makes the names known to DSPy.
"""

import asyncio
import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import dspy

from serve.dspy_lm.failures import HOPELESS, LmFailure, lm_failure, retry_after_s
from serve.dspy_lm.governed import (
    ROLLOUT,
    AsyncAttempt,
    Attempt,
    Conductor,
    Entry,
    governed,
    is_cached,
    own_timeout_s,
    retries_of,
)
from serve.engines.base import Complete
from serve.errors import ConfigurationError
from serve.models import full_name
from serve.reach import Reached, in_this_job

if hasattr(getattr(dspy, "lm15", None), "register_provider"):
    from serve.dspy_lm import engines as _end
else:
    from serve.dspy_lm import handler as _end  # type: ignore[no-redef]

__all__ = [
    "CONNECTION",
    "HOPELESS",
    "ROLLOUT",
    "AsyncAttempt",
    "Attempt",
    "Conductor",
    "Entry",
    "LmFailure",
    "call_usage",
    "governed",
    "is_cached",
    "is_lm_error",
    "list_price",
    "lm_failure",
    "lm_identity",
    "model_name",
    "own_timeout_s",
    "register",
    "retries_of",
    "retry_after_s",
    "served_lm",
    "student_adapter",
    "student_lm",
    "student_of",
]

PROVIDER = "raydistill"
NUM_RETRIES = 3
"""As ``dspy.LM`` has it."""

CONNECTION = frozenset(
    {"api_base", "base_url", "api_version", "cache", "num_retries", "timeout", "headers"}
)
"""Settings that only say how a model is reached."""

_SECRET = re.compile(r"api_?key|secret|password|credential|access_key|auth|headers|_token(_|$)")


def model_name(student: str) -> str:
    """The name by which DSPy finds a student, in this process and in others."""
    return f"{PROVIDER}/{full_name(student)}"


def student_of(model: str) -> str:
    """The student that a name of ``model_name`` is for.

    Raises:
        ConfigurationError: It is the name of something else.
    """
    provider, _, student = model.partition("/")
    if provider != PROVIDER or not student:
        raise ConfigurationError(
            f"model={model!r} is no student of raydistill's; expected {PROVIDER}/<student>, with "
            "a student directory, a Hugging Face model directory or a hub id."
        )
    return student


def register() -> None:
    """Make ``raydistill/<student>`` known to DSPy; again does nothing more."""
    _end.register(PROVIDER)


def student_lm(
    complete: Complete, loop: asyncio.AbstractEventLoop, model: str = "student"
) -> dspy.BaseLM:
    """An LM whose calls go to whatever completes chats, uncached and tried once.

    Args:
        complete: Answers one request, on ``loop``; such as ``Batcher.complete``.
        loop: The running event loop that ``complete`` belongs to. Programs that run in
            other threads are answered through it.
        model: The name that usage and histories show.
    """
    return _end.student_lm(Reached(complete, loop), model)


def served_lm(model: str, **settings: Any) -> dspy.BaseLM:
    """An LM that asks a model served for this Ray job; see ``serve.temporary``.

    Args:
        model: Its full name.
        settings: Of ``dspy.LM``: how it samples and tries again.
    """
    name = model_name(model)
    return _end.student_lm(in_this_job(model), name, **{"num_retries": NUM_RETRIES, **settings})


def student_adapter(adapter: dspy.Adapter) -> dspy.Adapter:
    """The adapter without its second try through JSON.

    A student has learned one layout of prompt; another one can only be answered worse.
    """
    adapter = copy.copy(adapter)
    if hasattr(adapter, "use_json_adapter_fallback"):
        adapter.use_json_adapter_fallback = False
    return adapter


def call_usage(entry: dict[str, Any]) -> tuple[int | None, int | None, float | None]:
    """Prompt tokens, completion tokens and USD of one recorded call; None is not known."""
    usage = entry.get("usage") or {}
    cost = 0.0 if _is_ours(entry.get("model", "")) else entry.get("cost")
    return usage.get("prompt_tokens"), usage.get("completion_tokens"), cost


def list_price(lm: dspy.BaseLM) -> tuple[float, float] | None:
    """USD per million prompt and completion tokens, as DSPy knows them; None: it does not."""
    if _is_ours(lm.model):
        return 0.0, 0.0
    prompt, completion = _end.list_price(lm)
    return None if prompt is None or completion is None else (1e6 * prompt, 1e6 * completion)


def _is_ours(model: str) -> bool:
    """Whether it is one that answers on the user's own machines, which nobody bills."""
    return model.startswith(f"{PROVIDER}/")


def is_lm_error(error: BaseException) -> bool:
    """Whether it was an LM that failed, and not the program around it."""
    # DSPy 3.4 wraps them in LMError; DSPy 3.1 lets litellm's own errors through.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"LMError", "OpenAIError"})


def lm_identity(lm: dspy.BaseLM) -> dict[str, Any]:
    """What names an LM, as JSON: its model and how it generates.

    Equal for LMs that differ only in how they are reached; without secrets.
    """
    identity = {"model": lm.model, **_named(lm.kwargs)}
    if lm.model_type != "chat":
        identity["model_type"] = lm.model_type
    engine = getattr(lm, "engine", "auto")
    if not isinstance(engine, str):
        identity["engine"] = {"class": _class_path(engine), **_named(vars(engine))}
    if type(lm) is not dspy.LM:
        own = {name: value for name, value in vars(lm).items() if name not in _BASE_STATE}
        identity = {**_named(own), **identity, "class": _class_path(lm)}
    return identity


_BASE_STATE = frozenset(
    {"model", "model_type", "kwargs", "history", "callbacks", "cache", "num_retries", "provider"}
)


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _plain(value)
        for name, value in settings.items()
        if value is not None and not name.startswith("_")
        if name not in CONNECTION and not _SECRET.search(name)
    }


def _plain(value: Any) -> Any:
    """A JSON value, or the type's name, which is the same in each process as ``repr`` is not."""
    if isinstance(value, Iterator):
        try:
            value = list(copy.copy(value))
        except TypeError:  # A generator has no copy, and must not be used up.
            return type(value).__qualname__
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return type(value).__qualname__


def _class_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


register()
