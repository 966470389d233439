"""What a student starts from: a micro-student made here, or a Hugging Face model.

Either is read through the same functions from a plain Hugging Face directory or id. Only
safetensors are read and no code from a model's directory is run.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available

from distill.config import SCRATCH, LongRows, ScratchConfig
from distill.training.encoding import Conversation, encode, end_of_turn_id
from serve.engines.quiet import no_progress_bars
from serve.errors import ConfigurationError, TrainingError
from serve.files import local_folder
from serve.models import CHAT_TEMPLATE

# The signs that folded prompts are joined with are tokens of their own.
_SIGNS = "¦¬"
_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

# As GPT-2 cuts a text, but digits one by one, and an underscore is a letter: the labels of a
# closed set then become one token each.
_PIECES = r" ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def make_scratch(
    folder: Path,
    conversations: Sequence[Conversation],
    sizes: ScratchConfig,
    *,
    max_length: int,
    seed: int,
    long_rows: LongRows = "drop",
) -> None:
    """Write a micro-student that has learned nothing yet: tokenizer, config, first weights.

    Args:
        folder: Filled with a plain Hugging Face directory.
        conversations: The training rows; the tokenizer is learned from their texts.
        sizes: Of the Llama. The vocabulary is smaller where the texts have no more to give.
        max_length: Longest row in tokens that will be trained on.
        seed: Decides the weights.
        long_rows: What becomes of longer ones.
    """
    tokenizer = _learn_tokenizer(conversations, sizes.vocab_size)
    rows, _ = encode(conversations, tokenizer, max_length, long_rows, "train row")
    longest = int(rows.lengths.max(initial=0))
    config = LlamaConfig(
        **sizes.model_dump(exclude={"size", "dropout"}) | {"vocab_size": len(tokenizer)},
        tie_word_embeddings=True,
        max_position_embeddings=_power_of_two(max(512, 2 * longest)),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    with no_progress_bars():
        model.save_pretrained(folder)


def load_tokenizer(model: str, setting: str = "student.model") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory or id, able to render and pad.

    Args:
        model: Its name.
        setting: What names it, for errors.

    Raises:
        ConfigurationError: There is no such model, or no tokenizer that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(setting, model, error) from error
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"{setting}={model}: its tokenizer has no tokenizer.json. Use a model that has."
        )
    if tokenizer.eos_token is None and tokenizer.chat_template is None:
        raise ConfigurationError(
            f"{setting}={model}: its tokenizer has neither a chat template nor an eos_token."
            " Use a model whose tokenizer has one of them."
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        # Loss and attention go by position, so padding with the end of a sequence never
        # hides a real one from the loss.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def local_base(model: str) -> Iterator[str]:
    """What the functions here can read: a remote folder's local copy, else the same."""
    if "://" not in model:
        yield model
        return
    with local_folder(model) as folder:
        yield str(folder)


def check_base_model(
    model: str, prompts: Sequence[Conversation] = (), setting: str = "student.model"
) -> None:
    """See that a model can be loaded and answers chats, without loading its weights.

    Args:
        model: Hugging Face directory or id.
        prompts: Prompts that its chat template has to render.
        setting: What names it, for errors.

    Raises:
        ConfigurationError: It cannot.
    """
    if model == SCRATCH:
        return
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(setting, model, error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigurationError(
            f"{setting}={model} is a {config.model_type}, not a causal language model. "
            "Use one that generates text from left to right."
        )
    if Path(model).is_dir():
        _check_weights(model, setting)
    tokenizer = load_tokenizer(model, setting)
    try:
        end_of_turn_id(tokenizer)
        for messages in prompts:
            tokenizer.apply_chat_template(list(messages), tokenize=False)
    except ConfigurationError:
        raise
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{setting}={model}: its chat template does not take the program's prompts "
            f"({error}). Use another model, or for a student student.prompt=folded."
        ) from error


def _check_weights(model: str, setting: str) -> None:
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        raise ConfigurationError(
            f"{setting}={model}: the folder has no *.safetensors file; other formats of "
            "weights can run code and are not read. Save it again with save_pretrained()."
        )
    for file in files:
        try:
            # Reads no more than its header, which says how long the file has to be.
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"{setting}={model}: {file.name} is damaged ({error}). Save the model again."
            ) from error


def max_positions(model: str) -> int | None:
    """The longest sequence a model takes, in tokens; None where it does not say."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(
    model: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, *, flash: bool = False
) -> PreTrainedModel:
    """A model's weights, all of them, on the CPU.

    Its generation settings stop at the tokenizer's end of turn.

    Args:
        model: Hugging Face directory or id.
        tokenizer: The model's.
        dtype: Of the weights.
        flash: Use FlashAttention-2 where it is installed and the model can be computed with it.

    Raises:
        TrainingError: It has no safetensors, or they lack weights that the model has.
    """
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_attention(model) if flash else {},
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"student.model={model} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise TrainingError(
            f"student.model={model} lacks {len(missing)} weights, such as {missing[0]}; a "
            "student would start with random ones. Use a complete causal language model."
        )
    if len(tokenizer) > loaded.get_input_embeddings().num_embeddings:
        loaded.resize_token_embeddings(len(tokenizer))
    _set_stop_tokens(loaded, tokenizer)
    return loaded


def _attention(model: str) -> dict[str, str]:
    """How to load a model to have FlashAttention-2, if it can be had."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    can = is_flash_attn_2_available() and kind._supports_flash_attn
    return {"attn_implementation": "flash_attention_2"} if can else {}


def _set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    known = model.generation_config.eos_token_id
    stops = known if isinstance(known, list) else [known] if known is not None else []
    stops = list(dict.fromkeys([*stops, end_of_turn_id(tokenizer)]))
    model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _learn_tokenizer(
    conversations: Sequence[Conversation], vocab_size: int
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"[{_SIGNS}]"), "isolated"),
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(conversations), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    for messages in conversations:
        for message in messages:
            # What is no text gives no tokens; whether its row can be trained on says ``encode``.
            if isinstance(content := message.get("content"), str):
                yield content.encode(errors="replace").decode()
        # Counted in each row, the signs' bytes are joined before anything rarer, for sure.
        yield _SIGNS


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _not_loadable(setting: str, model: str, error: Exception) -> ConfigurationError:
    reason = str(error).strip().split("\n")[0]
    return ConfigurationError(
        f"{setting}={model} cannot be loaded: {reason} Expected a Hugging Face id, a folder with "
        "config.json, tokenizer.json and *.safetensors, or scratch for a micro-student."
    )
