"""Which messages of a conversation are trained on, by the key ``weight`` of OpenAI's fine-tuning.

An assistant's message is, unless its weight is 0. No model ever sees the key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

WEIGHT = "weight"

Message = Mapping[str, Any]


def is_trained(message: Message) -> bool:
    """Whether a message is something to learn."""
    return message["role"] == "assistant" and message.get(WEIGHT) != 0


def as_input(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as something to answer, not to learn, as few-shot demos are."""
    return [
        {**message, WEIGHT: 0} if message["role"] == "assistant" else dict(message)
        for message in messages
    ]


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a model sees them."""
    return [{key: value for key, value in message.items() if key != WEIGHT} for message in messages]
