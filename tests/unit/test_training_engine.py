"""What training adds to a model, without DeepSpeed around it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.training.engine import add_dropout, parameter_groups


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **sizes))


def logits(model):
    return model(torch.arange(6)[None]).logits


def test_dropout_is_there_in_training_only_and_leaves_weights_alone():
    plain, dropping = tiny(), tiny()
    add_dropout(dropping, 0.5)
    assert dropping.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(dropping.eval()), logits(plain.eval()))
    dropping.train()
    assert not torch.equal(logits(dropping), logits(dropping))


def test_a_rate_of_zero_changes_nothing():
    plain, same = tiny().train(), tiny().train()
    add_dropout(same, 0.0)
    assert torch.equal(logits(same), logits(plain))


def test_norms_do_not_decay():
    decaying, others = parameter_groups(tiny(), weight_decay=0.1)
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert all(parameter.ndim == 1 for parameter in others["params"])
