"""What an inference engine is asked and what it answers.

Owns the request and result of one chat completion and the face that every engine shows.
How requests arrive together is for ``batcher``, how text is made for the engines.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serve.errors import DistillError


class RequestError(DistillError, ValueError):
    """A request that cannot be answered as it is; others are none the worse for it."""


class Overloaded(DistillError, RuntimeError):
    """The student has no room for another request now; it may have in a moment."""


@dataclass(frozen=True)
class ChatRequest:
    """One completion to make.

    Attributes:
        messages: OpenAI-style messages whose contents are text.
        max_tokens: Most new tokens; None is the student's own limit.
        temperature: 0 decodes greedily.
        stop: Texts at which the answer ends; they are not part of it.
        seed: Makes a sampled answer repeatable.

    Raises:
        RequestError: A value is out of range.
    """

    messages: Sequence[Mapping[str, Any]]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.messages:
            raise RequestError("messages is empty; expected at least one message.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens={self.max_tokens}; expected 1 or more.")
        if not 0 <= self.temperature <= 10:
            raise RequestError(f"temperature={self.temperature}; expected 0 to 10.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p}; expected more than 0 and at most 1.")


@dataclass(frozen=True)
class ChatResult:
    """One completion: its text, why it ended and what it took."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    folded: bool
    """Whether the prompt was folded; False where a request came in another layout."""


Complete = Callable[[ChatRequest], Awaitable[ChatResult]]
"""Answers one request; ``Batcher.complete`` is one."""


class Engine(Protocol):
    """Answers a batch of requests. Blocks; called from one thread at a time."""

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult | RequestError]:
        """The results in the order of the requests; a RequestError stands for itself only."""
        ...
