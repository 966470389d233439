"""Messages become the token ids that an engine is prompted with.

Owns the chat template's use, and that control tokens come from the template alone: the
same signs typed by a user are plain text. Other prompts get the ids that they are trained
on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Characters for private use: hardly ever in a text, and untouched by normalisation.
_MARKS = range(0xE000, 0xF900)

Messages = Sequence[Mapping[str, Any]]


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of the messages and of the start of an answer.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        messages: OpenAI-style messages whose contents are text.

    Raises:
        jinja2.TemplateError, TypeError, ValueError: The template does not take them.
    """
    signs = set(tokenizer.all_special_tokens)
    signs |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    contents = "".join(str(message.get("content")) for message in messages)
    typed = sorted((sign for sign in signs if sign in contents), key=len, reverse=True)
    if not typed:
        return list(_tokenise(tokenizer, _render(tokenizer, messages))["input_ids"])
    free = next(chr(code) for code in _MARKS if chr(code) not in contents)
    marks = {sign: f"{free}{index}{free}" for index, sign in enumerate(typed)}
    marked = [{**message, "content": _replace(message["content"], marks)} for message in messages]
    return _encode_marked(tokenizer, _render(tokenizer, marked), signs, marks)


def _encode_marked(
    tokenizer: Any, text: str, signs: set[str], marks: Mapping[str, str]
) -> list[int]:
    """Ids of a text with marks for typed signs: each stretch between control tokens alone.

    A tokenizer cuts a text at control tokens before anything else, so stretches without
    marks have the ids that they always have.
    """
    typed = {mark: sign for sign, mark in marks.items()}
    ids: list[int] = []
    start = 0

    def add(stretch: str) -> None:
        if stretch:
            plain = _replace(stretch, typed)
            ids.extend(_tokenise(tokenizer, plain, split_special_tokens=True)["input_ids"])

    encoding = _tokenise(tokenizer, text, return_offsets_mapping=True)
    for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        # An unknown character's token is special too, but does not stand for itself.
        if text[begin:end].strip() in signs:
            add(text[start:begin])
            ids.append(token)
            start = end
    add(text[start:])
    return ids


def _render(tokenizer: Any, messages: Messages) -> str:
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    )


def _tokenise(tokenizer: Any, text: str, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, **options)


def _replace(text: str, by: Mapping[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text
