"""The engine that runs a student in this process, with Hugging Face transformers.

Owns loading the model and tokenizer, folding and unfolding around them, and batched
generation on CPU or GPU. Waiting for a batch to fill is for ``batcher``.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from safetensors import SafetensorError

from serve.engines.base import ChatRequest, ChatResult, RequestError
from serve.engines.batches import plan_batches
from serve.engines.grammar import Grammars
from serve.engines.prompts import encode_prompt
from serve.engines.quiet import no_progress_bars
from serve.errors import StudentError
from serve.folding import Folding
from serve.student import MANIFEST, Manifest

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512
"""Where no manifest says how long answers are."""


@dataclass(frozen=True)
class _Prompt:
    """A request made ready: its token ids, limits, and the predictor if it was folded."""

    request: ChatRequest
    ids: list[int]
    max_new_tokens: int
    predictor: str | None

    @property
    def setting(self) -> tuple[Any, ...]:
        """Prompts may share a batch where this is equal."""
        request = self.request
        # A seeded answer must not depend on who else is in the batch.
        alone = id(self) if request.temperature and request.seed is not None else None
        return (self.max_new_tokens, request.temperature, request.top_p, alone)


class TransformersEngine:
    """A student, or any causal language model, loaded into this process.

    Args:
        model_dir: A student directory, or a plain Hugging Face one, whose prompts are full.
        num_threads: CPU threads to compute with; None leaves torch's choice.
        chat_template: For a tokenizer that has none.

    Raises:
        StudentError: The directory does not hold a loadable model.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        num_threads: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        manifest = Manifest.load(model_dir) if Path(model_dir, MANIFEST).exists() else None
        self._folding = (
            Folding.from_json(manifest.folding) if manifest and manifest.folding else None
        )
        self._default_max_tokens = manifest.max_new_tokens if manifest else MAX_NEW_TOKENS
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._tokenizer = _load(model_dir, self._device, chat_template)
        self._eos = _eos_of(self._model, self._tokenizer)
        pad = self._tokenizer.pad_token_id
        self._pad: int = self._eos[0] if pad is None else pad
        # A base model's own sampling defaults must not leak into requests.
        self._model.generation_config = transformers.GenerationConfig(
            eos_token_id=self._eos, pad_token_id=self._pad
        )
        self._grammars = Grammars(self._tokenizer, self._eos, manifest.grammar if manifest else {})
        limit = self._model.config.get_text_config().max_position_embeddings
        self._max_positions: int = limit or self._tokenizer.model_max_length

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult | RequestError]:
        """Answer the requests, in order. See ``Engine``."""
        results: dict[int, ChatResult | RequestError] = {}
        prompts: list[tuple[int, _Prompt]] = []
        for index, request in enumerate(requests):
            try:
                prompts.append((index, self._prepare(request)))
            except RequestError as error:
                results[index] = error
        lengths = [len(prompt.ids) for _, prompt in prompts]
        for batch in plan_batches(lengths, [prompt.setting for _, prompt in prompts]):
            outputs = self._generate([prompts[place][1] for place in batch])
            for place, ids in zip(batch, outputs, strict=True):
                index, prompt = prompts[place]
                results[index] = self._result(prompt, ids)
        return [results[index] for index in range(len(requests))]

    def _prepare(self, request: ChatRequest) -> _Prompt:
        folded = self._folding.fold_prompt(request.messages) if self._folding else None
        messages = folded.messages if folded else list(request.messages)
        try:
            ids = encode_prompt(self._tokenizer, messages)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the model's chat template does not take these messages: {error}"
            ) from error
        if not ids:
            raise RequestError("these messages come to no text at all.")
        room = self._max_positions - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the model takes at most "
                f"{self._max_positions - 1}. Shorten the input."
            )
        max_new_tokens = min(request.max_tokens or self._default_max_tokens, room)
        return _Prompt(request, ids, max_new_tokens, folded.predictor if folded else None)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        """New token ids of each prompt, up to and including the end token if it came."""
        width = max(len(prompt.ids) for prompt in prompts)
        input_ids = torch.full((len(prompts), width), self._pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):  # Padded on the left: int64[B, T].
            input_ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            attention_mask[row, width - len(prompt.ids) :] = 1
        first = prompts[0].request
        with torch.random.fork_rng(enabled=first.seed is not None):
            if first.seed is not None:
                torch.manual_seed(first.seed)
            output = self._model.generate(
                input_ids=input_ids.to(self._device),
                attention_mask=attention_mask.to(self._device),
                max_new_tokens=prompts[0].max_new_tokens,
                logits_processor=self._grammars.processor([p.predictor for p in prompts]),
                **_sampling(first),
            )
        return [_until(ids, self._eos) for ids in output[:, width:].tolist()]

    def _result(self, prompt: _Prompt, ids: list[int]) -> ChatResult:
        ended = bool(ids) and ids[-1] in self._eos
        text = self._tokenizer.decode(
            ids[:-1] if ended else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if self._folding and prompt.predictor:
            # What does not unfold goes out as it is: the caller's parser will say so.
            unfolded = self._folding.unfold_completion(prompt.predictor, text)
            text = text if unfolded is None else unfolded
        text, stopped = _stop_at(text, prompt.request.stop)
        return ChatResult(
            text=text,
            finish_reason="stop" if ended or stopped else "length",
            prompt_tokens=len(prompt.ids),
            completion_tokens=len(ids),
            folded=prompt.predictor is not None,
        )


def _load(
    model_dir: str | os.PathLike[str], device: torch.device, chat_template: str | None
) -> tuple[Any, Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        with no_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, local_files_only=True, use_safetensors=True, dtype=_dtype(device)
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StudentError(
            f"{model_dir}: cannot be loaded as a model ({error}). Expected config.json, "
            "model.safetensors and a tokenizer; a student is to be trained again."
        ) from error
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if not tokenizer.chat_template:
        raise StudentError(f"{model_dir}: the tokenizer has no chat_template.jinja.")
    return model.to(device).eval(), tokenizer


def _dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    # Older releases of torch cannot tell; there it stays at float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def _eos_of(model: Any, tokenizer: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise StudentError("generation_config.json names no eos_token_id, so no answer would end.")
    return list(eos) if isinstance(eos, list) else [eos]


def _sampling(request: ChatRequest) -> Mapping[str, Any]:
    if not request.temperature:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": 0,
    }


def _until(ids: list[int], eos: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in eos), None)
    return ids if end is None else ids[: end + 1]


def _stop_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
