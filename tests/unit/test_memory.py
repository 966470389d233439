"""What is said when training runs out of memory."""

import re

import pytest
import torch
from ray.exceptions import OutOfMemoryError

from distill.config import LoraConfig, StudentConfig, TrainConfig
from distill.training.memory import is_out_of_memory, out_of_memory

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "error",
    [
        GPU,
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OutOfMemoryError("Task was killed due to the node running low on memory."),
        RuntimeError("(1) The process is killed by SIGKILL by OOM killer due to high memory usage"),
    ],
)
def test_missing_memory_is_known_by_its_many_names(error):
    assert is_out_of_memory(error)


def test_other_failures_are_not_put_down_to_memory():
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def test_every_knob_that_saves_memory_is_named_until_it_is_used():
    said = out_of_memory(GPU, StudentConfig(model="org/model"), TrainConfig())
    for knob in (
        "train.per_device_train_batch_size=8",
        "train.gradient_accumulation_steps",
        "train.max_length",
        "train.gradient_checkpointing",
        "train.zero_stage",
        "train.offload_optimizer",
        "student.lora",
    ):
        assert knob in said
    used = TrainConfig(
        zero_stage=3, offload_optimizer=True, gradient_checkpointing=True, offload_param=True
    )
    said = out_of_memory(GPU, StudentConfig(model="org/model", lora=LoraConfig()), used)
    for knob in ("checkpointing", "zero_stage", "offload", "lora"):
        assert knob not in said


def test_packing_is_named_where_it_is_on():
    said = [out_of_memory(GPU, StudentConfig(), TrainConfig(packing=on)) for on in (False, True)]
    assert ["train.packing=false" in each for each in said] == [False, True]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_advised_can_be_set(stage):
    said = out_of_memory(GPU, StudentConfig(), TrainConfig(zero_stage=stage))
    knobs = re.findall(r"set train\.(\w+)=true", said)
    assert ("offload_optimizer" in knobs) == (stage > 0)
    TrainConfig(zero_stage=stage, **dict.fromkeys(knobs, True))
