"""Prompt folding: the part of a prompt that never changes, taken out and put back.

Owns how a predictor's prompts and completions are told apart into scaffold and values,
and the short text that stands for the values. It knows signatures and adapters only by
their methods, so it imports neither DSPy nor anything heavy. Training uses it to fold
rows, the engine to fold requests and unfold answers.

The scaffold is learned by rendering sentinel values and looking at what is around them.
The law: ``unfold(fold(x)) == x`` wherever ``fold(x)`` is not None. ``fold`` checks it on
each text, so it holds whatever an adapter does; a text that does not match is left alone.
"""

import logging
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from serve.errors import StudentError
from serve.templates import Template, learn_template

logger = logging.getLogger(__name__)

# Neither is whitespace, because chat templates trim messages.
SEPARATOR = "¦"
ESCAPE = "¬"

# Between role and content, and between messages, when a prompt is looked at as one text.
_BOUNDARY = "\0"
_TEXT_TYPES = {"Code", "Reasoning"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class FoldedPrompt:
    """A folded conversation and the predictor whose scaffold was taken out."""

    predictor: str
    messages: Messages


@dataclass(frozen=True)
class Folding:
    """The learned scaffolds of a program's predictors, in the program's order.

    Two predictors with the same prompt share the scaffold of the first; that holds for
    training and serving alike.
    """

    prompts: Mapping[str, Template]
    completions: Mapping[str, Template]
    unfoldable: Mapping[str, str] = field(default_factory=dict)
    """Predictors whose prompts stay as they are, with the reason."""

    @classmethod
    def learn(cls, predictors: Mapping[str, tuple[Any, Sequence[Any]]], adapter: Any) -> "Folding":
        """Learn the scaffold of each predictor from how the adapter renders it.

        Args:
            predictors: The signature and the demos of each predictor, by its name.
            adapter: A ``dspy.Adapter``, or anything with its ``format`` and
                ``format_assistant_message_content``.
        """
        prompts, completions, unfoldable = {}, {}, {}
        for name, (signature, demos) in predictors.items():
            try:
                _refuse_media(signature)
                prompt = learn_template(
                    list(signature.input_fields), _prompt_of(adapter, signature, demos)
                )
                completion = learn_template(
                    list(signature.output_fields),
                    partial(adapter.format_assistant_message_content, signature),
                )
            # An adapter is the user's code and may raise anything; the reason is recorded.
            except Exception as error:
                unfoldable[name] = str(error) or type(error).__name__
                logger.info("prompts of predictor %s stay full: %s", name, unfoldable[name])
            else:
                prompts[name], completions[name] = prompt, completion
        return cls(prompts, completions, unfoldable)

    def fold_prompt(self, messages: Sequence[Mapping[str, Any]]) -> FoldedPrompt | None:
        """The one user message ``predictor¦value¦value``, or None if no scaffold matches."""
        text = _flatten(messages)
        if text is None:
            return None
        for name, template in self.prompts.items():
            values = template.match(text)
            if values is not None and _BOUNDARY not in "".join(values):
                return FoldedPrompt(name, [{"role": "user", "content": _join([name, *values])}])
        return None

    def fold_completion(self, predictor: str, text: str) -> str | None:
        """The values of a completion as ``value¦value``, or None if it does not match."""
        template = self.completions.get(predictor)
        values = template.match(text) if template else None
        return None if values is None else _join(values)

    def fold_row(self, messages: Sequence[Mapping[str, Any]]) -> FoldedPrompt | None:
        """A folded training conversation; the last message is the assistant's.

        Returns:
            None unless the prompt and the completion both match: a row is folded whole.
        """
        if not messages or messages[-1].get("role") != "assistant":
            return None
        prompt = self.fold_prompt(messages[:-1])
        content = messages[-1].get("content")
        if prompt is None or not isinstance(content, str) or len(messages[-1]) != 2:
            return None
        completion = self.fold_completion(prompt.predictor, content)
        if completion is None:
            return None
        answer = {"role": "assistant", "content": completion}
        return FoldedPrompt(prompt.predictor, [*prompt.messages, answer])

    def unfold_prompt(self, messages: Sequence[Mapping[str, Any]]) -> Messages:
        """The messages that ``fold_prompt`` folded.

        Raises:
            ValueError: These are not the messages of a folded prompt.
        """
        name, *values = _split(messages[0]["content"] if len(messages) == 1 else "")
        template = self.prompts.get(name)
        if template is None or len(values) != template.num_fields:
            raise ValueError(f"not a folded prompt of {', '.join(self.prompts)}: {messages!r}")
        return _unflatten(template.fill(values))

    def unfold_completion(self, predictor: str, text: str) -> str | None:
        """The completion that the adapter expects; None if the values are too many or few."""
        template = self.completions.get(predictor)
        values = _split(text)
        if template is None or len(values) != template.num_fields:
            return None
        return template.fill(values)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads, as plain JSON values."""
        predictors = {
            name: {"prompt": prompt.to_json(), "completion": self.completions[name].to_json()}
            for name, prompt in self.prompts.items()
        }
        return {"predictors": predictors, "unfoldable": dict(self.unfoldable)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Folding":
        """Read what ``to_json`` wrote.

        Raises:
            StudentError: The data is not a folding.
        """
        try:
            predictors = data["predictors"]
            return cls(
                {name: Template.from_json(item["prompt"]) for name, item in predictors.items()},
                {name: Template.from_json(item["completion"]) for name, item in predictors.items()},
                dict(data["unfoldable"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StudentError(
                f"student.json: folding is damaged ({type(error).__name__}: {error}). "
                "Make the student again, or copy its student.json anew."
            ) from error


def escape(value: str) -> str:
    """A value as it stands in a folded text: it holds no separator."""
    return value.replace(ESCAPE, ESCAPE + "0").replace(SEPARATOR, ESCAPE + "1")


def _join(values: Iterable[str]) -> str:
    return SEPARATOR.join(map(escape, values))


def _split(text: str) -> list[str]:
    originals = {ESCAPE + "0": ESCAPE, ESCAPE + "1": SEPARATOR}
    return [
        re.sub(f"{ESCAPE}[01]", lambda found: originals[found[0]], value)
        for value in text.split(SEPARATOR)
    ]


def _flatten(messages: Sequence[Mapping[str, Any]]) -> str | None:
    parts: list[Any] = []
    for message in messages:
        if message.keys() != {"role", "content"}:
            return None
        parts += (message["role"], message["content"])
    if not all(isinstance(part, str) and _BOUNDARY not in part for part in parts):
        return None
    return _BOUNDARY.join(parts)


def _unflatten(text: str) -> Messages:
    parts = text.split(_BOUNDARY)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role, "content": content} for role, content in pairs]


def _prompt_of(adapter: Any, signature: Any, demos: Sequence[Any]) -> Callable[[dict], str]:
    def render(inputs: dict[str, Any]) -> str:
        text = _flatten(adapter.format(signature, list(demos), inputs))
        if text is None:
            raise ValueError("its messages hold more than text")
        return text

    return render


def _refuse_media(signature: Any) -> None:
    for name, info in signature.input_fields.items():
        for kind in _classes_in(info.annotation):
            origins = (base.__module__ for base in kind.__mro__)
            special = any(origin.startswith("dspy.adapters.types") for origin in origins)
            if special and kind.__name__ not in _TEXT_TYPES:
                raise ValueError(f"its input {name} is a dspy.{kind.__name__}, not plain text")


def _classes_in(annotation: Any) -> list[type]:
    inner = [kind for part in typing.get_args(annotation) for kind in _classes_in(part)]
    return [annotation, *inner] if isinstance(annotation, type) else inner
