import pytest
from pydantic import ValidationError

from distill.config import TrainConfig
from distill.training.deepspeed_config import (
    check_precision,
    make_deepspeed_config,
    needs_compiler,
)
from distill.training.schedule import learning_rate_factor
from serve.errors import ConfigurationError


def make(bf16_supported=True, use_gpu=False, **settings):
    return make_deepspeed_config(
        TrainConfig(**settings), num_workers=2, use_gpu=use_gpu, bf16_supported=bf16_supported
    )


def test_the_training_section_decides_what_it_names():
    config = make(
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        zero_stage=3,
        learning_rate=1e-3,
        weight_decay=0.2,
    )
    assert config["train_micro_batch_size_per_gpu"] == 16
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 3
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["optimizer"]["params"]["weight_decay"] == 0.2


def test_bf16_follows_the_processor_unless_told():
    assert make(bf16_supported=True)["bf16"]["enabled"]
    assert not make(bf16_supported=False)["bf16"]["enabled"]
    assert make(bf16_supported=False, bf16=True)["bf16"]["enabled"]
    assert not make(bf16_supported=True, bf16=False)["bf16"]["enabled"]


def test_without_zero_the_weights_stay_in_fp32():
    config = make(zero_stage=0)
    assert not config["bf16"]["enabled"]
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_fp16_turns_automatic_bf16_off():
    config = make(fp16=True)
    assert config["fp16"]["enabled"]
    assert not config["bf16"]["enabled"]


def test_deepspeed_keys_are_merged_over_the_generated_ones():
    config = make(
        deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True


def test_adam_needs_no_compiler_unless_it_is_asked_for():
    config = make(offload_optimizer=True)
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert not needs_compiler(config)
    assert needs_compiler(make(deepspeed={"optimizer": {"params": {"torch_adam": False}}}))


def test_what_is_offloaded_may_be_told_more_of():
    details = {"offload_param": {"pin_memory": True, "buffer_count": 7}}
    config = make(
        zero_stage=3, offload_param=True, deepspeed={"zero_optimization": details}, use_gpu=True
    )
    found = config["zero_optimization"]["offload_param"]
    assert found == {"device": "cpu", "pin_memory": True, "buffer_count": 7}
    assert "offload_optimizer" not in config["zero_optimization"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload_param": True}, "zero_stage=3"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16"),
        ({"fp16": True, "zero_stage": 0}, "zero_stage 1, 2 or 3"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, named):
    with pytest.raises(ValidationError, match=named):
        TrainConfig(**settings)


def test_fp16_needs_a_gpu():
    check_precision(TrainConfig(fp16=True), use_gpu=True)
    check_precision(TrainConfig(bf16=True), use_gpu=False)
    with pytest.raises(ConfigurationError, match=r"train\.bf16"):
        check_precision(TrainConfig(fp16=True), use_gpu=False)


def test_accumulated_gradients_are_kept_in_fp32():
    assert make(gradient_accumulation_steps=4)["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ({"train_batch_size": 5}, "train.per_device_train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 5}, "train.per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 5}, "train.gradient_accumulation_steps"),
        ({"gradient_clipping": 5.0}, "train.max_grad_norm"),
        ({"zero_optimization": {"stage": 3}}, "train.zero_stage"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "train.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.lr_scheduler_type"),
        ({"bf16": {"enabled": True}}, "train.bf16"),
        ({"fp16": {"enabled": True}}, "train.fp16"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "train.offload_optimizer",
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "train.offload_param"),
    ],
)
def test_a_contradiction_names_the_key_to_use_instead(override, instead):
    with pytest.raises(ConfigurationError, match=instead):
        make(deepspeed=override)


def test_saying_the_same_twice_is_no_contradiction():
    config = make(deepspeed={"train_batch_size": 16, "zero_optimization": {"stage": 2}})
    assert config["train_batch_size"] == 16


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_then_follows_its_schedule(kind):
    factors = [
        learning_rate_factor(step, num_steps=100, warmup_ratio=0.1, kind=kind)
        for step in range(100)
    ]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == 1.0 if kind == "constant" else factors[-1] < 0.02


def test_without_warm_up_the_first_step_is_at_full_rate():
    assert learning_rate_factor(0, num_steps=1, warmup_ratio=0.0, kind="cosine") == 1.0


def test_warm_up_steps_take_the_place_of_the_ratio():
    def factor(step):
        return learning_rate_factor(
            step, num_steps=100, warmup_ratio=0.5, kind="constant", warmup_steps=4
        )

    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
