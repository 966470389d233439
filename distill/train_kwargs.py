"""Reads DSPy's ``train_kwargs``: a dict of training settings, from a DSPy user's own code.

Owns what differs from the configuration file: where results go is among them, one key has an
older name, and values may be numpy's. The keys themselves are ``TrainConfig``'s.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from distill.config import TrainConfig
from distill.config_file import explain
from serve.errors import ConfigurationError

# TRL's older name, which DSPy's own LocalProvider takes.
_OTHER_NAMES = {"max_seq_length": "max_length"}


@dataclass(frozen=True)
class TrainKwargs:
    """What a user's ``train_kwargs`` say.

    Attributes:
        train: How to train; what they leave open is as the student's model needs it.
        output_dir: Where the student goes, as it was given; None where it was not.
    """

    train: TrainConfig
    output_dir: str | None


class _Keys(TrainConfig):
    output_dir: Annotated[str, Field(min_length=1)] | None = None


def parse_train_kwargs(kwargs: Mapping[str, Any], model: str) -> TrainKwargs:
    """Read and check ``train_kwargs``.

    Args:
        kwargs: Keys of ``TrainConfig``, ``output_dir``, and ``max_seq_length`` for
            ``max_length``.
        model: What the student starts from: ``scratch``, or a Hugging Face directory or id.

    Raises:
        ConfigurationError: A key is unknown, or a value of the wrong type or out of range;
            the message names each of them.
    """
    if not isinstance(kwargs, Mapping):
        raise ConfigurationError(
            f"train_kwargs: expected a dict such as {{'learning_rate': 5e-5}}, found {kwargs!r}."
        )
    written = {_OTHER_NAMES.get(key, key): key for key in kwargs}
    if len(written) < len(kwargs):
        raise ConfigurationError(
            "train_kwargs['max_seq_length'] is the older name of train_kwargs['max_length']; "
            "found both. Leave one out."
        )

    def name_key(keys: Sequence[str]) -> str:
        return "train_kwargs" + "".join(f"[{written.get(key, key)!r}]" for key in keys)

    try:
        keys = _Keys.model_validate({key: _plain(kwargs[name]) for key, name in written.items()})
    except ValidationError as error:
        raise ConfigurationError(explain(error, _Keys, name_key)) from None
    given = keys.model_dump(include=keys.model_fields_set - {"output_dir"})
    return TrainKwargs(TrainConfig(**given).fitted_to(model), keys.output_dir)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return value.value
    return os.fspath(value) if isinstance(value, os.PathLike) else value
