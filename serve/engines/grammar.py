"""Decoding under a grammar: at each step, only tokens that keep an answer valid.

The grammars are compiled and followed by llguidance; here they meet the decode loop of
transformers. What is valid is said in the manifest, by ``serve.patterns``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
import transformers

from serve.errors import StudentError


class Grammars:
    """The grammars of a student's predictors, compiled for its tokenizer.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        eos: Tokens that end an answer.
        patterns: Regular expression of each predictor's answers.

    Raises:
        StudentError: A pattern cannot be compiled.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int], patterns: Mapping[str, str]) -> None:
        self._eos = eos
        compiler = llguidance.hf.from_tokenizer(tokenizer, eos_token=list(eos))
        self._matchers = {
            predictor: _compile(compiler, pattern) for predictor, pattern in patterns.items()
        }

    def processor(self, predictors: Sequence[str | None]) -> transformers.LogitsProcessorList:
        """What holds each row of a batch to its predictor's grammar; None leaves it free."""
        matchers = [
            self._matchers[name].deep_copy() if name in self._matchers else None
            for name in predictors
        ]
        bound = [_Follow(matchers, self._eos)] if any(matchers) else []
        return transformers.LogitsProcessorList(bound)


class _Follow(transformers.LogitsProcessor):
    """Follows each row's answer and bars the tokens that cannot come next."""

    def __init__(self, matchers: Sequence[llguidance.LLMatcher | None], eos: Sequence[int]) -> None:
        self._matchers = matchers
        self._eos = list(eos)
        self._started = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores: float[B, V] of the next token, after input_ids: int64[B, T]."""
        last = input_ids[:, -1].tolist()
        for row, matcher in enumerate(self._matchers):
            if matcher is None:
                continue
            if self._started and not matcher.is_stopped():
                matcher.consume_token(last[row])
            allowed = self._allowed(matcher, scores.shape[1])
            scores[row, ~allowed.to(scores.device)] = -torch.inf
        self._started = True
        return scores

    def _allowed(self, matcher: llguidance.LLMatcher, vocab_size: int) -> torch.Tensor:
        """bool[V]; the model may have more positions than the tokenizer has tokens."""
        allowed = np.zeros(vocab_size, dtype=bool)
        if matcher.is_stopped():
            # Nothing can follow; the loop pads where the end has been said already.
            allowed[self._eos] = True
        else:
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(mask, bitorder="little")[:vocab_size]
            allowed[: len(bits)] = bits
        return torch.from_numpy(allowed)


def _compile(tokenizer: Any, pattern: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(pattern))
    if matcher.is_error():
        raise StudentError(
            f"student.json: grammar: {pattern!r} is no pattern that can be decoded under "
            f"({matcher.get_error()}). Make the student again."
        )
    return matcher
