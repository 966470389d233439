import pytest

from distill.config import TrainConfig
from distill.training.deepspeed_config import make_deepspeed_config
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
    config = make(deepspeed={"fp16": {"enabled": True}})
    assert config["fp16"]["enabled"]
    assert not config["bf16"]["enabled"]


def test_deepspeed_keys_are_merged_over_the_generated_ones():
    config = make(
        deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True


def test_adam_needs_no_compiler_unless_it_offloads():
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert make()["optimizer"]["params"]["torch_adam"]
    assert not make(deepspeed=offload)["optimizer"]["params"]["torch_adam"]


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
    ],
)
def test_a_contradiction_names_the_key_to_use_instead(override, instead):
    with pytest.raises(ConfigurationError, match=instead):
        make(deepspeed=override)


def test_fp16_and_bf16_together_are_refused():
    with pytest.raises(ConfigurationError, match=r"train\.bf16=false"):
        make(bf16=True, deepspeed={"fp16": {"enabled": True}})


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
