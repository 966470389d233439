"""Conversations become tokens, and each token learns whether it is part of the completion.

What is trained on is the prompt as an engine renders it, then the answer, then the token
that ends a turn: exactly what generation has to reproduce. The tokenizer comes from
``base_model``; batches are made in ``batches``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill.training.batches import EncodedRows
from serve.errors import ConfigurationError

Conversation = Sequence[Mapping[str, Any]]
"""Messages; the last is the assistant's."""

_PROBE = "completion"
_TOKENISED_AT_ONCE = 1000


def encode(
    conversations: Sequence[Conversation], tokenizer: Any, max_length: int
) -> tuple[EncodedRows, int]:
    """Tokenise conversations through the tokenizer's chat template.

    Returns:
        The rows, and how many were left out because they are longer than ``max_length``.
    """
    end = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    encoded = enumerate(_encode_each(conversations, tokenizer, end))
    fitting = [(source, row) for source, row in encoded if len(row[0]) <= max_length]
    kept = [row for _, row in fitting]
    rows = EncodedRows(
        input_ids=np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in kept)]),
        completion=np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in kept)]),
        offsets=np.cumsum([0, *(len(ids) for ids, _ in kept)], dtype=np.int64),
        sources=np.array([source for source, _ in fitting], dtype=np.int64),
    )
    return rows, len(conversations) - len(kept)


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
    conversations: Sequence[Conversation], tokenizer: Any, end: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(conversations), _TOKENISED_AT_ONCE):
        some = conversations[start : start + _TOKENISED_AT_ONCE]
        prompts = [_render_prompt(messages, tokenizer) for messages in some]
        texts = [
            f"{prompt}{messages[-1]['content']}{end}"
            for prompt, messages in zip(prompts, some, strict=True)
        ]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for prompt, text, ids, spans in zip(
            prompts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if any(start < len(prompt) < stop for start, stop in spans):
                # Generation starts from the whole prompt's own tokens: none may straddle.
                yield _encode_apart(prompt, text[len(prompt) :], tokenizer)
                continue
            mask = np.array([stop > len(prompt) for _, stop in spans], dtype=np.bool_)
            yield np.array(ids, dtype=np.int32), mask


def _encode_apart(prompt: str, answer: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)
    )
    mask = np.repeat([False, True], [len(before), len(after)])
    return np.array([*before, *after], dtype=np.int32), mask


def _render_prompt(messages: Conversation, tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(
        list(messages[:-1]), tokenize=False, add_generation_prompt=True
    )
