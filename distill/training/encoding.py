"""Conversations become tokens, and each token learns whether it is part of a completion.

What is trained on is, for every turn of the assistant, the prompt as an engine renders it,
then the answer, then the token that ends a turn: exactly what generation has to reproduce.
Turns of a conversation share a sequence as long as that holds of each, and get one of their
own otherwise, as with a template that shows an earlier turn differently once more follow.
The tokenizer comes from ``base_model``; batches are made in ``batches``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.config import LongRows
from distill.training.batches import EncodedRows
from distill.turns import is_trained, plain
from serve.errors import ConfigurationError

Conversation = Sequence[Mapping[str, Any]]
"""Messages, at least one of which the assistant is to learn."""

_PROBE = "completion"
_TOKENISED_AT_ONCE = 1000
"""Conversations. The tokenizer shares out so many texts among threads of its own."""

_Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True)
class LongCounts:
    """What became of the rows that were too long."""

    dropped: int = 0
    cut: int = 0

    def __add__(self, other: "LongCounts") -> "LongCounts":
        return LongCounts(self.dropped + other.dropped, self.cut + other.cut)


@dataclass(frozen=True)
class _Text:
    """What becomes one sequence.

    Attributes:
        text: From the start of the prompt to the end of the last completion.
        completions: Where each completion begins and ends, in order.
    """

    text: str
    completions: tuple[tuple[int, int], ...]


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    max_length: int,
    long_rows: LongRows = "drop",
    where: str = "row",
) -> tuple[EncodedRows, LongCounts]:
    """Tokenise conversations through the tokenizer's chat template.

    Args:
        conversations: The rows.
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        max_length: Most tokens of a row.
        long_rows: What becomes of longer ones.
        where: What a conversation is called in errors; its number follows, from 1.

    Returns:
        The rows, in order, and what became of those over ``max_length``.

    Raises:
        ConfigurationError: The template does not say what an answer is, or it or the tokenizer
            does not take a conversation.
    """
    kept: list[_Tokens] = []
    sources: list[int] = []
    dropped = cut = 0
    for source, (ids, mask) in _encode_each(conversations, tokenizer, where):
        if len(ids) <= max_length:
            kept.append((ids, mask))
            sources.append(source)
            continue
        part = {
            "drop": slice(0),
            "keep_start": slice(max_length),
            "keep_end": slice(len(ids) - max_length, None),
        }[long_rows]
        # A first token is predicted from nothing.
        if mask[part][1:].any():
            kept.append((ids[part], mask[part]))
            sources.append(source)
            cut += 1
        else:
            dropped += 1
    rows = EncodedRows(
        input_ids=np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in kept)]),
        completion=np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in kept)]),
        offsets=np.cumsum([0, *(len(ids) for ids, _ in kept)], dtype=np.int64),
        sources=np.array(sources, dtype=np.int64),
    )
    return rows, LongCounts(dropped, cut)


def end_of_turn_id(tokenizer: Any) -> int:
    """The token after an assistant's message: what stops generation.

    Raises:
        ConfigurationError: The chat template ends the message with no special token, and
            the tokenizer has no end-of-sequence token.
    """
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    after = text[text.rfind(_PROBE) + len(_PROBE) :]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    found = next((token for token in ids if token in special), tokenizer.eos_token_id)
    if found is None:
        raise ConfigurationError(
            "The model's chat template ends an answer with no special token, and its "
            "tokenizer has no eos_token. Use a model whose tokenizer has one."
        )
    return int(found)


def _encode_each(
    conversations: Sequence[Conversation], tokenizer: Any, where: str
) -> Iterator[tuple[int, _Tokens]]:
    """Each sequence, and which of the conversations it is of."""
    end = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    for start in range(0, len(conversations), _TOKENISED_AT_ONCE):
        some = conversations[start : start + _TOKENISED_AT_ONCE]
        found: list[tuple[int, _Text]] = []
        for source, messages in enumerate(some, start=start):
            with _naming(f"{where} {source + 1}"):
                found += [(source, text) for text in _texts(messages, tokenizer, end)]
        if not found:
            continue
        encoded = _tokenised(found, tokenizer, where)
        for (source, each), ids, offsets in zip(
            found, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            if _straddles(spans, each):
                for span in each.completions:
                    yield source, _encode_apart(each.text, *span, tokenizer)
            else:
                tokens = np.asarray(ids, dtype=np.int32)
                yield source, (tokens, _is_completion(spans, each))


def _tokenised(found: Sequence[tuple[int, _Text]], tokenizer: Any, where: str) -> Any:
    """What the tokenizer makes of all the texts, with where in them each token is."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    try:
        return tokenizer([each.text for _, each in found], **options)
    # Of which types a tokenizer's refusals are is up to it, and none says of which text it is.
    except Exception:
        for source, each in found:
            with _naming(f"{where} {source + 1}"):
                tokenizer(each.text, **options)
        raise


@contextmanager
def _naming(row: str) -> Iterator[None]:
    """Say of an error which row it is of, and what can be done.

    Raises:
        ConfigurationError: In the place of whatever was raised.
    """
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{row}: {error}") from error
    # A template is a program of its own and raises what it likes.
    except Exception as error:
        raise ConfigurationError(
            f"{row}: the model's chat template or tokenizer does not take it "
            f"({type(error).__name__}: {error}). Leave the row out or change its messages as the "
            "template expects them, or use another model."
        ) from error


def _texts(messages: Conversation, tokenizer: Any, end: str) -> list[_Text]:
    """The sequences that a conversation's turns are trained in: one, if the template lets them."""
    shown = plain(messages)
    found: list[_Text] = []
    # Nothing asks for what opens a conversation.
    for index in reversed(range(1, len(messages))):
        if not is_trained(messages[index]):
            continue
        prompt = _render(shown[:index], tokenizer, add_generation_prompt=True)
        whole = prompt + _answer(shown[: index + 1], prompt, tokenizer, end)
        span = (len(prompt), len(whole))
        for place, other in enumerate(found):
            if other.text.startswith(whole):
                found[place] = _Text(other.text, (span, *other.completions))
                break
        else:
            found.append(_Text(whole, (span,)))
    if not found and any(map(is_trained, messages[:1])):
        raise ConfigurationError(
            "the assistant's message comes first, so nothing asks for it. Put before it what it "
            "answers, or leave the row out."
        )
    return found[::-1]


def _answer(messages: Conversation, prompt: str, tokenizer: Any, end: str) -> str:
    """What has to be generated for the last message, with what ends it."""
    if not messages[-1].get("tool_calls"):
        content = messages[-1].get("content")
        if not isinstance(content, str):
            raise ConfigurationError(
                f"what the assistant says has to be text, found {type(content).__name__}. Write "
                "it as text, or leave the row out."
            )
        return content + end
    # Only the template knows how a call is written, if it writes any.
    whole = _render(messages, tokenizer)
    silent = {"role": "assistant", "content": messages[-1].get("content") or ""}
    stop = whole.find(end, len(prompt))
    ends = stop >= 0 and whole.startswith(prompt)
    if not ends or whole == _render([*messages[:-1], silent], tokenizer):
        raise ConfigurationError(
            "The model's chat template does not write a tool call as an answer that ends with "
            f"{end}; found {whole[-80:]!r}. Use another model, or rows without tool calls."
        )
    return whole[len(prompt) : stop + len(end)]


def _straddles(spans: NDArray[np.int64], each: _Text) -> bool:
    """Whether a token begins before a completion and ends in it.

    Generation starts from the whole prompt's own tokens, so none may.
    """
    starts = [start for start, _ in each.completions]
    before = np.searchsorted(starts, spans[:, 0], side="right")
    return bool((np.searchsorted(starts, spans[:, 1], side="left") > before).any())


def _is_completion(spans: NDArray[np.int64], each: _Text) -> NDArray[np.bool_]:
    """bool[T], whether a token ends within a completion."""
    bounds = np.array(each.completions, dtype=np.int64).ravel()
    return np.searchsorted(bounds, spans[:, 1], side="left") % 2 == 1


def _encode_apart(text: str, start: int, stop: int, tokenizer: Any) -> _Tokens:
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (text[:start], text[start:stop])
    )
    mask = np.repeat([False, True], [len(before), len(after)])
    return np.array([*before, *after], dtype=np.int32), mask


def _render(messages: Iterable[Mapping[str, Any]], tokenizer: Any, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
