"""Packed rows teach a model what they teach it padded, and one at a time."""

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.training.batches import Batch, EncodedRows, collate
from distill.training.engine import check_packing, weighted_losses
from distill.training.packing import pack
from serve.errors import TrainingError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, sliding": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=5),
    "gemma": GemmaConfig(**SIZES),
    "gemma2, sliding": Gemma2Config(**SIZES, sliding_window=5),
}


def make_rows(shapes=((3, 4), (9, 6), (1, 1), (12, 2), (2, 9), (5, 5), (1, 3))):
    random = np.random.default_rng(0)
    lengths = [prompt + completion for prompt, completion in shapes]
    mask = [flag for p, c in shapes for flag in [False] * p + [True] * c]
    return EncodedRows(
        input_ids=random.integers(1, 64, sum(lengths)).astype(np.int32),
        completion=np.array(mask, np.bool_),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
    )


def loss_and_gradients(model, rows, micro_batches, shape=lambda batch: batch):
    model.zero_grad()
    total = torch.zeros(())
    for indices in micro_batches:
        loss = weighted_losses(model, shape(collate(rows, indices, 0.3, pad_id=0))).sum()
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return total / rows.loss_weights(0.3).sum(), gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_padded_and_single_rows_give_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    check_packing(model)
    model.train()
    rows = make_rows()
    packed = pack(rows, max_length=25)
    assert 1 < len(packed) < len(rows)
    assert len(set(packed.lengths)) > 1  # One of them is padded.
    expected_loss, expected = loss_and_gradients(model, rows, [[i] for i in range(len(rows))])
    for batch_rows, micro_batches in (
        (rows, [range(len(rows))]),
        (packed, [range(len(packed))]),
        (packed, [[i] for i in range(len(packed))] + [[]]),
    ):
        loss, gradients = loss_and_gradients(model, batch_rows, micro_batches)
        torch.testing.assert_close(loss, expected_loss)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_only_positions_whose_prediction_counts_are_projected(name, prompt_weight):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    projected = []
    model.lm_head.register_forward_hook(lambda _, given, out: projected.append(out.numel() // 64))
    for rows in (make_rows(), pack(make_rows(), max_length=25)):
        batch = collate(rows, range(len(rows)), prompt_weight, pad_id=0)
        losses = weighted_losses(model, batch)
        assert projected.pop() == len(losses) == (batch.weights > 0).sum()
        logits = model(
            **{
                key: torch.from_numpy(array)
                for key, array in vars(batch).items()
                if array is not None and key in ("input_ids", "attention_mask", "position_ids")
            },
            use_cache=False,
        ).logits
        projected.clear()
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            torch.from_numpy(batch.input_ids[:, 1:].flatten()),
            reduction="none",
        ) * torch.from_numpy(batch.weights[:, 1:].flatten())
        torch.testing.assert_close(losses.sum(), expected.sum())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2, sliding"])
def test_a_micro_batch_as_one_sequence_gives_the_same_loss_and_gradients(name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float32, attn_implementation=attention
    )
    packed = pack(make_rows(), max_length=25)
    everything = [range(len(packed))]
    expected_loss, expected = loss_and_gradients(model, packed, everything)
    loss, gradients = loss_and_gradients(model, packed, everything, Batch.as_one_sequence)
    torch.testing.assert_close(loss, expected_loss)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)


def attend_as_flash_does(module, query, key, value, attention_mask, **kwargs):
    """Rows are looked for in the positions, and only in those of a batch of one."""
    positions = kwargs["position_ids"]
    rows = (positions == 0).cumsum(-1)
    apart = rows[:, :, None] == rows[:, None, :]
    seen = torch.ones_like(apart) if len(query) > 1 else apart
    mask = seen.tril()[:, None].expand(len(query), -1, -1, -1)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@pytest.fixture
def flash(monkeypatch):
    """The name of an attention that sees what FlashAttention sees, but on a CPU."""
    name = "flash_attention_on_cpu"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, attend_as_flash_does)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, lambda **_: None)
    return name


def test_flash_attention_keeps_the_rows_of_a_micro_batch_apart(flash):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    packed = pack(make_rows(), max_length=25)
    everything = [range(len(packed))]
    expected_loss, expected = loss_and_gradients(model, packed, everything)
    model.config._attn_implementation = flash
    check_packing(model)
    loss, gradients = loss_and_gradients(model, packed, everything)
    torch.testing.assert_close(loss, expected_loss)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)
    # As it would be were they not end to end.
    batch = collate(packed, everything[0], 0.3, pad_id=0)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    leaking = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    model.config._attn_implementation = "sdpa"
    right = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (leaking - right).abs().max() > 1e-3


def test_a_row_does_not_see_the_others_of_its_sequence():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).eval()
    packed = pack(make_rows(((4, 4), (4, 4))), max_length=16)
    batch = collate(packed, [0], 0.0, pad_id=0)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    changed = ids.clone()
    changed[0, :8] = (changed[0, :8] + 1) % 64
    with torch.no_grad():
        before, after = (
            model(input_ids=some, position_ids=positions, use_cache=False).logits
            for some in (ids, changed)
        )
    assert not torch.equal(before[0, :8], after[0, :8])
    torch.testing.assert_close(before[0, 8:], after[0, 8:])


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
        # Positions or not, its attention knows nothing of them.
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
    ],
    ids=["mamba", "bloom"],
)
def test_a_model_that_cannot_keep_rows_apart_is_refused(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(TrainingError, match=r"train\.packing=false"):
        check_packing(model)
