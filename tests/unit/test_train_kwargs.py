"""DSPy's train_kwargs: what is taken, what it means, and what a refusal says."""

from pathlib import Path

import numpy as np
import pytest

from distill.config import TrainConfig
from distill.train_kwargs import parse_train_kwargs
from serve.errors import ConfigurationError

GUIDE = {
    "learning_rate": 2e-5,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "warmup_ratio": 0.2,
    "weight_decay": 0.05,
    "max_grad_norm": 0.5,
    "logging_steps": 7,
    "save_strategy": "steps",
}


def test_every_key_of_dspys_guide_means_what_it_says():
    parsed = parse_train_kwargs({**GUIDE, "output_dir": "out"}, "org/model")
    assert parsed.train == TrainConfig(**GUIDE)
    assert {key: getattr(parsed.train, key) for key in GUIDE} == GUIDE
    assert parsed.output_dir == "out"


def test_none_given_leaves_the_defaults_of_fine_tuning():
    parsed = parse_train_kwargs({}, "org/model")
    assert parsed.train == TrainConfig()
    assert parsed.output_dir is None


def test_a_scratch_student_gets_what_it_needs_and_explicit_values_win():
    train = parse_train_kwargs({"learning_rate": 5e-5}, "scratch").train
    assert train.learning_rate == 5e-5
    assert train.num_train_epochs == 12
    assert train.per_device_train_batch_size == 32
    assert train.weight_decay == 0.1


def test_numpy_scalars_whole_floats_and_paths_are_taken():
    parsed = parse_train_kwargs(
        {
            "num_train_epochs": 3.0,
            "logging_steps": np.float64(2.0),
            "save_strategy": "steps",
            "save_steps": np.int64(9),
            "learning_rate": np.float32(0.5),
            "bf16": np.bool_(False),
            "output_dir": Path("a") / "b",
        },
        "org/model",
    )
    assert (parsed.train.num_train_epochs, parsed.train.logging_steps) == (3, 2)
    assert (parsed.train.save_steps, parsed.train.learning_rate) == (9, 0.5)
    assert parsed.train.bf16 is False
    assert parsed.output_dir == "a/b"


def test_values_of_transformers_enums_are_taken():
    from transformers import IntervalStrategy, SchedulerType

    kwargs = {"save_strategy": IntervalStrategy.NO, "lr_scheduler_type": SchedulerType.LINEAR}
    train = parse_train_kwargs(kwargs, "org/model").train
    assert (train.save_strategy, train.lr_scheduler_type) == ("no", "linear")


def test_max_seq_length_is_the_older_name_of_max_length():
    assert parse_train_kwargs({"max_seq_length": 128}, "org/model").train.max_length == 128
    with pytest.raises(ConfigurationError, match="found both"):
        parse_train_kwargs({"max_seq_length": 128, "max_length": 64}, "org/model")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rte", "learning_rate"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("num_epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("train_batch_size", "per_device_train_batch_size"),
        ("warmup_step", "warmup_steps"),
        ("output_directory", "output_dir"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    with pytest.raises(ConfigurationError) as caught:
        parse_train_kwargs({key: 1}, "org/model")
    assert f"train_kwargs[{key!r}]: unknown key; did you mean {nearest}?" in str(caught.value)


@pytest.mark.parametrize("key", ["qqq", "int", "a[b]", 3])
def test_a_key_like_no_other_is_refused_as_well(key):
    with pytest.raises(ConfigurationError, match="train_kwargs") as caught:
        parse_train_kwargs({key: 1}, "org/model")
    assert str(key) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", -1, "greater than 0"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", "fast", "number"),
        ("learning_rate", None, "number"),
        ("num_train_epochs", 2.5, "integer"),
        ("num_train_epochs", 0, "greater than or equal to 1"),
        ("warmup_ratio", 1.5, "less than 1"),
        ("save_strategy", "always", "'no', 'epoch' or 'steps'"),
        ("save_steps", 0, "greater than or equal to 1"),
        ("max_seq_length", 1, "greater than or equal to 8"),
        ("use_gpu", "maybe", "'auto'"),
        ("output_dir", 3, "string"),
        ("output_dir", "", "at least 1 character"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found_and_expected(key, value, expected):
    with pytest.raises(ConfigurationError) as caught:
        parse_train_kwargs({key: value}, "org/model")
    message = str(caught.value)
    assert message.startswith(f"train_kwargs[{key!r}]: ")
    assert expected in message
    assert f"found {value!r}" in message


def test_every_mistake_is_said_at_once():
    with pytest.raises(ConfigurationError) as caught:
        parse_train_kwargs({"lr": 1, "num_train_epochs": 0}, "org/model")
    assert "train_kwargs['lr']" in str(caught.value)
    assert "train_kwargs['num_train_epochs']" in str(caught.value)


def test_what_is_no_dict_is_refused():
    with pytest.raises(ConfigurationError, match="expected a dict"):
        parse_train_kwargs([("learning_rate", 1)], "org/model")
