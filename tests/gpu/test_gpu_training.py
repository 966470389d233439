"""Training on GPUs: 16 bits, ZeRO, adapters, and packed rows with each kind of attention."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from distill.config import ScratchConfig, StudentConfig
from distill.training.base_model import load_model, load_tokenizer, make_scratch
from distill.training.batches import collate
from distill.training.encoding import encode
from distill.training.engine import check_packing, weighted_losses
from distill.training.packing import pack
from tests.training_runs import SIZES, row, run, write_rows

pytestmark = pytest.mark.gpu

LORA = {"r": 4, "alpha": 8}
ROWS = [row(number)["messages"] for number in range(50)]
ATTENTION = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not is_flash_attn_2_available(), reason="needs the package flash_attn"
        ),
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face model that has learned nothing yet."""
    folder = tmp_path_factory.mktemp("base")
    make_scratch(folder, ROWS, ScratchConfig(**SIZES), max_length=256, seed=0)
    return folder


@pytest.fixture(scope="module")
def train(base, gpus, tmp_path_factory):
    """Trains on every GPU of this machine."""

    def train(lora=None, **settings):
        folder = tmp_path_factory.mktemp("run")
        write_rows(folder)
        student = StudentConfig(model=str(base), lora=lora)
        return run(
            folder, student, **{"use_gpu": True, "num_workers": gpus, "max_length": 200} | settings
        )

    return train


def losses(result):
    return [epoch["train_loss"] for epoch in result.history]


@pytest.fixture(scope="module")
def in_float32(train):
    """Losses in full precision: of all weights, and of adapters."""
    return {
        lora: losses(train(LORA if lora else None, bf16=False, zero_stage=0))
        for lora in (False, True)
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_sixteen_bits_come_near_and_the_student_is_of_them(
    train, in_float32, kind, zero_stage, lora
):
    settings = {"bf16": False, kind: True, "zero_stage": zero_stage}
    # Few steps, of which none is to be lost to finding a scale.
    settings["deepspeed"] = {"fp16": {"initial_scale_power": 8}} if kind == "fp16" else {}
    result = train(LORA if lora else None, **settings)
    assert losses(result) == pytest.approx(in_float32[lora], rel=0.05)
    weights = load_file(f"{result.model_dir}/model.safetensors")
    expected = torch.bfloat16 if kind == "bf16" else torch.float16
    assert {weight.dtype for weight in weights.values()} == {expected}
    AutoModelForCausalLM.from_pretrained(result.model_dir)


def test_packed_rows_train_with_zero(train):
    result = train(packing=True, bf16=True, zero_stage=2, num_train_epochs=1)
    assert result.rows == 50
    assert result.train_loss > 0
    with open(f"{result.model_dir}/config.json") as file:
        assert "flash" not in json.dumps(json.load(file))


@pytest.mark.parametrize("flash", ATTENTION, ids=["sdpa", "flash"])
def test_packed_rows_give_the_loss_and_gradients_of_single_ones(base, flash):
    tokenizer = load_tokenizer(str(base))
    model = load_model(str(base), tokenizer, torch.bfloat16, flash=flash).cuda()
    assert (model.config._attn_implementation == "flash_attention_2") is flash
    check_packing(model)
    model.train()
    rows, _ = encode(ROWS[:12], tokenizer, 256)
    packed = pack(rows, int(rows.lengths.max()) * 3)
    expected, gradients = learn(model, rows, [[number] for number in range(len(rows))])
    # Several sequences in one micro batch.
    found, others = learn(model, packed, [range(len(packed))])
    assert len(packed) > 1
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.0)
    similar = torch.nn.functional.cosine_similarity(gradients, others, dim=0)
    assert similar > 0.99


def learn(model, rows, micro_batches):
    model.zero_grad()
    total = torch.zeros((), device=model.device)
    for indices in micro_batches:
        loss = weighted_losses(model, collate(rows, indices, 0.3, pad_id=0)).sum()
        loss.backward()
        total += loss.detach()
    return total, torch.cat([p.grad.flatten().float() for p in model.parameters()])
