"""Every knob of the engine against plain PyTorch, on real workers with real DeepSpeed."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine_runs import make_base, train_cases, train_plainly

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
EQUAL = {
    f"zero{stage}-accumulation{accumulation}": {
        "zero_stage": stage,
        "gradient_accumulation_steps": accumulation,
    }
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 4)
}
KNOBS = {
    "offload1": {"zero_stage": 1, "offload_optimizer": True},
    "offload2": {"zero_stage": 2, "offload_optimizer": True, "gradient_accumulation_steps": 4},
    "offload3": {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
    "checkpointing2": {"zero_stage": 2, "gradient_checkpointing": True},
    "checkpointing3": {"zero_stage": 3, "gradient_checkpointing": True},
    "warmup": {"warmup_steps": 3, "lr_scheduler_type": "constant"},
    "lora0": {"zero_stage": 0, "lora": LORA},
    "lora2": {"zero_stage": 2, "lora": LORA, "resumed": True, "save_strategy": "epoch"},
    "lora3": {"zero_stage": 3, "lora": LORA, "resumed": True, "save_strategy": "epoch"},
}
SIXTEEN_BITS = {
    f"{kind}-zero{stage}": {"bf16": False, kind: True, "zero_stage": stage, "learning_rate": 0.1}
    for kind, stages in (("bf16", (0, 2, 3)), ("fp16", (1, 2, 3)))
    for stage in stages
} | {
    "bf16-lora3": {"bf16": True, "zero_stage": 3, "lora": LORA, "learning_rate": 0.1},
    "bf16-accumulation": {"bf16": True, "gradient_accumulation_steps": 4, "learning_rate": 0.1},
}
SEEDED = {
    f"seeded{time}": {"zero_stage": 2, "dropout": 0.1, "lr_scheduler_type": "linear"}
    for time in (1, 2)
}
EXPORTED = "model/model.safetensors"
TO_NO_EFFECT = {
    "zero_stage",
    "offload_optimizer",
    "offload_param",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "resumed",
    "save_strategy",
}
ALONE = EQUAL
TOGETHER = EQUAL | KNOBS | SIXTEEN_BITS | SEEDED


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, make_base(folder)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A folder of trained cases for each number of workers."""
    folders = {}
    for num_workers, cases in ((1, ALONE), (2, TOGETHER)):
        folders[num_workers] = tmp_path_factory.mktemp(f"workers{num_workers}")
        train_cases(folders[num_workers], *base, cases, num_workers)
    return folders


@pytest.fixture(scope="module")
def plain(base):
    """Trains a case in plain PyTorch; once, where a knob makes no difference to that."""

    @functools.cache
    def trained_as(settings, num_workers):
        model, losses = train_plainly(*base, json.loads(settings), num_workers)
        model = model.merge_and_unload() if json.loads(settings).get("lora") else model
        return model.state_dict(), losses

    def train(case, num_workers):
        without = {key: value for key, value in case.items() if key not in TO_NO_EFFECT}
        return trained_as(json.dumps(without, sort_keys=True), num_workers)

    return train


def losses_of(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return [epoch["train_loss"] for epoch in metrics["history"]]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", EQUAL)
def test_losses_and_weights_equal_those_of_plain_pytorch(base, plain, trained, num_workers, name):
    check_equal(base[0], trained[num_workers] / name, *plain(EQUAL[name], num_workers))


@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_changes_neither_losses_nor_weights(base, plain, trained, name):
    check_equal(base[0], trained[2] / name, *plain(KNOBS[name], 2))


def check_equal(base, folder, expected, losses):
    found, untrained = load_file(folder / EXPORTED), load_file(base / "model.safetensors")
    assert losses_of(folder) == pytest.approx(losses, rel=1e-5)
    assert found.keys() == untrained.keys() <= expected.keys()
    assert any(not torch.equal(found[name], untrained[name]) for name in found)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_come_near(plain, trained, name):
    _, losses = plain(SIXTEEN_BITS[name], 2)
    assert losses_of(trained[2] / name) == pytest.approx(losses, rel=0.02)


@pytest.mark.parametrize("name", [name for name in TOGETHER if "lora" not in name])
def test_the_exported_weights_are_the_engines_bit_for_bit(trained, name):
    folder = trained[2] / name
    exported, engine = load_file(folder / EXPORTED), load_file(folder / "engine.safetensors")
    check_same(exported, engine)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("name", [name for name in TOGETHER if "lora" in name])
def test_the_adapter_is_kept_and_is_what_was_merged(base, trained, name):
    folder = trained[2] / name / "model"
    assert not list(folder.rglob("*.bin"))
    # Where ZeRO-0 computes in bf16 the weights stay in float32.
    exported = load_file(trained[2] / name / EXPORTED)
    dtype = next(iter(exported.values())).dtype
    model = AutoModelForCausalLM.from_pretrained(base[0], dtype=dtype)
    adapted = PeftModel.from_pretrained(model, folder / "adapter", autocast_adapter_dtype=False)
    merged = dict(adapted.merge_and_unload().named_parameters())
    check_same(exported, {key: value.detach() for key, value in merged.items()})


@pytest.mark.parametrize("name", ["lora2", "lora3"])
def test_adapters_resume_and_their_checkpoints_hold_no_frozen_weight(trained, name):
    folder = trained[2] / name
    check_same(load_file(folder / "resumed" / EXPORTED), load_file(folder / EXPORTED))
    assert losses_of(folder / "resumed") == losses_of(folder)
    assert not (folder / "resumed" / "checkpoint_2").exists()
    for file in (folder / "checkpoint_1" / "engine").rglob("*model_states.pt"):
        held = torch.load(file, weights_only=False)["module"]
        # DeepSpeed takes the other name of a tied matrix for a weight that is trained.
        rest = {weight for weight in held if ".lora_" not in weight}
        assert rest <= {"base_model.model.lm_head.weight"} < held.keys()


def test_the_same_seed_gives_the_same_student(trained):
    one, other = (load_file(trained[2] / f"seeded{time}" / EXPORTED) for time in (1, 2))
    check_same(one, other)


ALONE_WITH_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
logits = []
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), (folder, info)
    logits.append(model(torch.arange(20)[None]).logits)
assert not {"distill", "serve", "deepspeed", "peft", "ray"} & set(sys.modules)
torch.save(logits, sys.argv[1])
"""
RELOADED = ["zero3-accumulation4", "bf16-zero2", "lora3"]


@pytest.fixture(scope="module")
def reloaded(trained, tmp_path_factory):
    """Logits of exported students, made in a process that knows transformers alone."""
    file = tmp_path_factory.mktemp("reloaded") / "logits.pt"
    folders = [str(trained[2] / name / "model") for name in RELOADED]
    command = [sys.executable, "-I", "-c", ALONE_WITH_TRANSFORMERS, str(file), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(RELOADED, torch.load(file), strict=True))


@pytest.mark.parametrize("name", RELOADED)
def test_the_export_gives_the_engines_logits_in_transformers_alone(trained, reloaded, name):
    expected = torch.load(trained[2] / name / "logits.pt")
    tolerance = 2e-2 if "bf16" in name else 1e-5
    torch.testing.assert_close(reloaded[name], expected, rtol=tolerance, atol=tolerance)
