"""Reading DSPy's prompts and writing the replies that DSPy parses, without DSPy.

Owns the layout of ``ChatAdapter`` (``[[ ## field ## ]]`` sections) and of ``JSONAdapter``,
which DSPy falls back on when a reply could not be parsed. What to answer is for the
stand-in teachers.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from examples.standin_teacher import TeacherRefuses, message_text

_HEADER = re.compile(r"^\[\[ ## (\w+) ## \]\]\n", re.MULTILINE)
_REMINDER = re.compile(r"\n\nRespond with (?:the corresponding output fields|a JSON object)")
_QUOTED_NAME = re.compile(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`")


@dataclass(frozen=True)
class FieldPrompt:
    """What a prompt gives and what it asks for."""

    inputs: dict[str, str]
    """Field name -> value, as rendered in the last user message."""
    outputs: tuple[str, ...]
    """Names of the fields asked for, in order."""
    wants_json: bool

    def reply(self, values: Mapping[str, str]) -> str:
        """Render a reply that gives ``values`` for the fields asked for."""
        if self.wants_json:
            return json.dumps({name: values[name] for name in self.outputs})
        sections = [f"[[ ## {name} ## ]]\n{values[name]}" for name in self.outputs]
        return "\n\n".join([*sections, "[[ ## completed ## ]]"])


def read_prompt(messages: list[dict]) -> FieldPrompt:
    """Read the last user message of a prompt rendered by ChatAdapter or JSONAdapter.

    Raises:
        TeacherRefuses: 400, when the message is not such a prompt.
    """
    users = [message for message in messages if message.get("role") == "user"]
    text = message_text(users[-1]) if users else ""
    reminders = list(_REMINDER.finditer(text))
    headers = list(_HEADER.finditer(text))
    if not reminders or not headers:
        raise TeacherRefuses(400, "the stand-in teacher answers only DSPy's chat and JSON prompts")
    start = reminders[-1].start()
    ends = [header.start() - len("\n\n") for header in headers[1:]] + [start]
    values = {
        header[1]: text[header.end() : end] for header, end in zip(headers, ends, strict=True)
    }
    reminder = text[start:]
    names = [name for name in _QUOTED_NAME.findall(reminder) if name != "completed"]
    return FieldPrompt(values, tuple(names), "a JSON object" in reminder)
