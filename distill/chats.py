"""What a conversation from outside has to be to become a row.

Pure. Which of its messages are learned is ``turns``; what a model's chat template makes of
them is for ``training.encoding``.
"""

from collections.abc import Mapping
from typing import Any

from distill.turns import WEIGHT, is_trained
from serve.errors import ConfigurationError

ROLES = ("system", "developer", "user", "assistant")
TOOL = "tool"
_CALLS = "tool_calls"


def check_chat(where: str, messages: Any, *, tools: bool = False) -> None:
    """See that something can be learned from a conversation.

    Args:
        where: What it is of, for errors.
        messages: As in OpenAI's fine-tuning.
        tools: Whether it may call tools and have their answers.

    Raises:
        ConfigurationError: Nothing can.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigurationError(f"{where}: messages: expected a list of at least one message.")
    for index, message in enumerate(messages):
        _check_message(f"{where}: messages[{index}]", message, tools)
    last = messages[-1]
    if last["role"] != "assistant" or not (last.get(_CALLS) or last["content"].strip()):
        raise ConfigurationError(
            f"{where}: the last message must be what the assistant says, and not be empty."
        )
    if not any(is_trained(message) for message in messages):
        raise ConfigurationError(
            f"{where}: every message of the assistant has weight 0, so there is nothing to learn "
            "from. Give one of them weight 1, or remove the row."
        )
    if not any(is_trained(message) for message in messages[1:]):
        raise ConfigurationError(
            f"{where}: the assistant's message comes first, so nothing asks for it. Put before it "
            "what it answers, or remove the row."
        )


def _check_message(where: str, message: Any, tools: bool) -> None:
    roles = (*ROLES, TOOL) if tools else ROLES
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in roles:
        raise ConfigurationError(f"{where}: expected a role of {', '.join(roles)}, found {role!r}.")
    calls, content = message.get(_CALLS), message.get("content")
    if calls and not (tools and role == "assistant"):
        raise ConfigurationError(
            f"{where}.{_CALLS}: found {str(calls)[:100]}. Only text can be learned from."
        )
    if not isinstance(content, str) and not (calls and content is None):
        raise ConfigurationError(
            f"{where}.content: expected text, found {type(content).__name__}. Only text can be "
            "learned from."
        )
    try:
        (content or "").encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{where}.content: {error.object[error.start]!r} is half of a surrogate pair, which "
            "is no text. Write the character in whole, or remove the row."
        ) from None
    if message.get(WEIGHT) not in (None, 0, 1):
        raise ConfigurationError(f"{where}.{WEIGHT}: expected 0 or 1, found {message[WEIGHT]!r}.")
