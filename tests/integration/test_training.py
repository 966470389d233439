"""Training on a real local Ray with real DeepSpeed, two workers on two CPUs."""

import signal
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import StudentConfig
from distill.training.mailbox import run_with_events
from serve.errors import TrainingError
from tests.training_runs import COLOURS, row, run, write_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

EPOCHS = 12
LEARNING = {
    "num_train_epochs": EPOCHS,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 2,
    "prompt_loss_weight": 0.0,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two workers under ZeRO-2, with the events it sent."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder, num_rows=200)
    events = []
    return run(folder, on_event=events.append, **LEARNING), events


def test_the_student_learns_its_rows(trained):
    result, _ = trained
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] / 2
    model = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    answers = []
    for number in range(8):
        prompt = tokenizer.apply_chat_template(
            row(number)["messages"][:-1], add_generation_prompt=True, return_tensors="pt"
        )
        ids = model.generate(**prompt, max_new_tokens=result.max_new_tokens, do_sample=False)
        new = ids[0, prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    right = sum(answer == COLOURS[number % 4] for number, answer in enumerate(answers))
    assert right >= 5, answers


def test_the_chosen_epoch_is_exported_as_a_plain_directory(trained):
    result, _ = trained
    chosen = result.history[result.best_epoch - 1]
    assert (result.val_loss, result.val_exact) == (chosen["val_loss"], chosen["val_exact"])
    names = {path.name for path in Path(result.model_dir).iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_the_result_counts_what_was_done(trained):
    result, _ = trained
    assert (result.rows, result.val_rows, result.dropped_rows) == (200, 10, 0)
    assert result.steps == EPOCHS * 50
    assert [epoch["epoch"] for epoch in result.history] == list(range(1, EPOCHS + 1))
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert result.num_parameters == sum(p.numel() for p in model.parameters())


def test_every_step_and_epoch_is_told_in_order(trained):
    result, events = trained
    steps = [event["step"] for event in events if event["event"] == "train_step"]
    epochs = [event["epoch"] for event in events if event["event"] == "train_epoch"]
    assert steps == list(range(1, result.steps + 1))
    assert epochs == list(range(1, EPOCHS + 1))
    assert (events[0]["event"], events[0]["step"]) == ("train_start", 0)
    for event in events:
        assert (event["num_steps"], event["num_epochs"]) == (result.steps, EPOCHS)
        assert 50 * (event["epoch"] - 1) <= event["step"] <= 50 * event["epoch"]


def test_a_finished_run_is_not_trained_again(trained):
    result, _ = trained
    folder = Path(result.model_dir).parents[3]
    events = []
    again = run(folder, on_event=events.append, **LEARNING)
    assert events == []
    assert again == result


def test_a_trained_student_can_be_trained_further(trained, tmp_path):
    result, _ = trained
    write_rows(tmp_path, num_rows=20, num_val_rows=0)
    student = StudentConfig(model=result.model_dir)
    again = run(tmp_path, student, num_train_epochs=1, num_workers=1, max_length=16)
    assert again.num_parameters == result.num_parameters
    assert again.val_loss is None
    assert again.dropped_rows > 0
    assert again.history[0]["train_loss"] < result.history[0]["train_loss"]


def test_divergence_is_an_error_that_names_the_step(tmp_path):
    write_rows(tmp_path)
    with pytest.raises(TrainingError, match=r"(loss|gradient) of steps? \d+"):
        run(tmp_path, learning_rate=1e30, max_grad_norm=1e30, bf16=False)


def test_nothing_to_train_on_is_an_error(tmp_path):
    write_rows(tmp_path)
    with pytest.raises(TrainingError, match=r"train\.max_length"):
        run(tmp_path, max_length=8)
    with pytest.raises(TrainingError, match="no such rows file"):
        run(tmp_path / "nowhere")


def test_an_error_of_the_callback_reaches_the_caller():
    def refuse(event):
        raise KeyError(event["event"])

    with pytest.raises(KeyError, match="told"):
        run_with_events(lambda mailbox: ray.get(mailbox.put.remote({"event": "told"})), refuse)


def test_the_first_interrupt_still_reaches_the_caller_after_training(trained):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
