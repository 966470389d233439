"""What is said before Ray is there and before the teacher is asked."""

import importlib.util

import pytest

from distill import preflight
from distill.cli import main
from distill.config import ScratchConfig, StudentConfig, TrainConfig
from distill.training.base_model import make_scratch
from serve.errors import ConfigurationError
from tests.runs import TINY, RunFolder
from tests.training_runs import row

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def base(tmp_path):
    """A Hugging Face model that has learned nothing yet."""
    folder = tmp_path / "base"
    make_scratch(folder, [row(0)["messages"]], ScratchConfig(**TINY), max_length=64, seed=0)
    return folder


@pytest.fixture
def without_peft(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "peft" else find(name, *of)
    )


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.usefixtures("without_peft")
def test_adapters_without_peft_are_refused_before_anything_is_paid_for(
    tmp_path, base, capfd, command
):
    folder = RunFolder(tmp_path, NOBODY, {"student": {"model": str(base), "lora": {"r": 4}}})
    assert main([command, str(folder.path / "config.yaml")]) == 2
    said = capfd.readouterr().out
    assert "student.lora needs the package peft" in said
    assert "raydistill[lora]" in said


def test_adapters_are_taken_where_peft_is(base):
    preflight.check_training(StudentConfig(model=str(base), lora={}), TrainConfig())


@pytest.mark.usefixtures("without_peft")
def test_whoever_trains_all_weights_needs_no_peft(base):
    preflight.check_training(StudentConfig(model=str(base)), TrainConfig())
    preflight.check_training(StudentConfig(), TrainConfig())
    with pytest.raises(ConfigurationError, match="peft"):
        preflight.check_training(StudentConfig(model=str(base), lora={}), TrainConfig())
