"""Models by name: a folder, a URI or a hub id becomes an engine in this process.

Owns what a name may be, and what is said of one that cannot be loaded. How a model answers
is for the engines.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import ConfigurationError
from serve.files import absolute, local_folder

if TYPE_CHECKING:
    from serve.engines.transformers import TransformersEngine

SCRATCH = "scratch"
"""Stands for a micro-student that is yet to be trained."""

EXPECTED = "Expected a student directory, a Hugging Face model directory or a hub id."

CHAT_TEMPLATE = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}"
)
"""For micro-students, and models whose tokenizer has none."""

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def full_name(model: str) -> str:
    """The name by which other processes know the model: local folders by absolute path."""
    if model == SCRATCH or is_hub_id(model) or ("://" in model and not model.startswith("file://")):
        return model.rstrip("/")
    return absolute(model).rstrip("/")


def is_hub_id(model: str) -> bool:
    """Whether the name is one on the Hugging Face hub, and not that of a local folder."""
    return bool(_HUB_ID.fullmatch(model)) and not Path(model).exists()


def check_model(model: str) -> None:
    """See that the name can be that of a model; what is remote is not looked for.

    Raises:
        ConfigurationError: It cannot.
    """
    if model == SCRATCH:
        raise ConfigurationError(
            "scratch is not trained yet, so it cannot answer. Train it first, and use the LM "
            "that training returns."
        )
    if "://" not in model and not is_hub_id(model) and not Path(model).is_dir():
        raise ConfigurationError(f"{model}: no such directory. {EXPECTED}")


def load_engine(model: str, num_threads: int | None = None) -> "TransformersEngine":
    """Load a student or any other causal language model.

    Args:
        model: A student directory or a plain Hugging Face one, local or by URI, or a hub id.
        num_threads: CPU threads to compute with; None leaves torch's choice.

    Raises:
        ConfigurationError: There is no such model.
        StudentError: It is there but cannot be loaded.
    """
    # Importing torch belongs to whoever loads a model, not to whoever names one.
    from serve.engines.transformers import TransformersEngine

    with _folder(model) as folder:
        return TransformersEngine(folder, num_threads, CHAT_TEMPLATE)


@contextmanager
def _folder(model: str) -> Iterator[Path]:
    """The model's files in a local folder, a copy of them where they are elsewhere."""
    check_model(model)
    if is_hub_id(model):
        yield _downloaded(model)
        return
    with ExitStack() as files:
        try:
            folder = files.enter_context(local_folder(model))
        except (OSError, ImportError, ValueError) as error:
            raise ConfigurationError(f"{model}: cannot be read ({error}). {EXPECTED}") from error
        yield folder


def _downloaded(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{model}: neither a directory here nor to be had from the hub ({reason}). {EXPECTED}"
        ) from error
