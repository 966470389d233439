"""Training on a real local Ray with real DeepSpeed, two workers on two CPUs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
import torch.nn.functional as F
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import StudentConfig, TrainConfig
from distill.training.batches import plan_epoch
from distill.training.encoding import encode
from distill.training.engine import parameter_groups
from distill.training.job import train
from distill.training.mailbox import run_with_events
from distill.training.schedule import learning_rate_factor
from serve.errors import TrainingCancelled, TrainingError

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SCRATCH = StudentConfig(scratch={**SIZES, "dropout": 0.0})
WITH_DROPOUT = StudentConfig(scratch={**SIZES, "dropout": 0.1})
EPOCHS = 12
LEARNING = {
    "num_train_epochs": EPOCHS,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 2,
    "prompt_loss_weight": 0.0,
    "logging_steps": 1,
}
COLOURS = ["red", "green", "blue", "yellow"]


def row(number):
    colour = COLOURS[number % 4]
    question = f"{' please' * (number % 7)} paint item {number}¦{colour}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": colour},
    ]
    return {"messages": messages, "predictor": "p", "example_id": str(number), "folded": True}


def write_rows(folder, num_rows=50, num_val_rows=10):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (
        ("train", range(num_rows)),
        ("val", range(num_rows, num_rows + num_val_rows)),
    ):
        lines = [json.dumps(row(number)) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def never():
    return False


def run(
    folder, student=SCRATCH, on_event=lambda event: None, name="run", cancelled=never, **settings
):
    defaults = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "logging_steps": 2}
    return train(
        train_rows=str(folder / "train.jsonl"),
        val_rows=str(folder / "val.jsonl"),
        student=student,
        train=TrainConfig(**defaults | settings),
        storage=str(folder / "checkpoints"),
        name=name,
        on_event=on_event,
        cancelled=cancelled,
    )


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    started = not ray.is_initialized()
    if started:
        environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    if started:
        ray.shutdown()


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


@pytest.mark.parametrize(
    ("zero_stage", "accumulation", "num_rows"), [(2, 2, 50), (3, 1, 17)], ids=["zero2", "zero3"]
)
def test_steps_equal_those_of_plain_pytorch_on_the_whole_batch(
    tmp_path, zero_stage, accumulation, num_rows
):
    write_rows(tmp_path, num_rows, num_val_rows=0)
    settings = {
        "zero_stage": zero_stage,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        "bf16": False,
        "learning_rate": 0.5,
        # With a large epsilon, Adam's steps are as long as the gradient, so that a wrong
        # scale of the gradient shows as well as a wrong direction.
        "deepspeed": {"optimizer": {"params": {"eps": 1.0}}},
    }
    result = run(tmp_path, **settings)
    trained = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32)
    base = tmp_path / "checkpoints" / "run" / "base"
    config = TrainConfig(per_device_train_batch_size=8, **settings)
    expected = train_plainly(base, tmp_path / "train.jsonl", config)
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, weight in expected.state_dict().items():
        assert not torch.equal(weight, untrained[name]), name
        torch.testing.assert_close(trained.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def train_plainly(base, rows_file, config):
    """The same steps, each as one batch, without DeepSpeed, ranks or micro batches."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = rows_file.read_text("utf-8").splitlines()
    rows, _ = encode([json.loads(line)["messages"] for line in lines], tokenizer, 512)
    accumulation = config.gradient_accumulation_steps
    plans = [
        plan_epoch(
            rows.lengths,
            rows.loss_weights(0.3),
            world_size=2,
            micro_batch_size=8,
            accumulation=accumulation,
            epoch=epoch,
        )
        for epoch in (1, 2)
    ]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        eps=1.0,
    )
    factor = partial(
        learning_rate_factor, num_steps=sum(map(len, plans)), warmup_ratio=0.1, kind="cosine"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in [step for plan in plans for step in plan]:
        total, weight = torch.zeros(()), 0.0
        for number in [i for rank in step.micro_batches for micro in rank for i in micro]:
            start, stop = rows.offsets[number : number + 2]
            ids = torch.from_numpy(rows.input_ids[start:stop]).long()
            weights = torch.from_numpy(rows.token_weights(number, 0.3))
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total = total + (losses * weights[1:]).sum()
            weight += float(weights.sum())
        optimizer.zero_grad()
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()
    return model


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


def test_without_saving_on_the_way_a_run_starts_anew_and_its_last_student_is_the_result(tmp_path):
    write_rows(tmp_path, num_rows=200)
    settings = {"save_strategy": "no", "num_train_epochs": 15}
    told, again = threading.Event(), []

    def cancel_after_the_first_epoch(event):
        if event["epoch"] == 2:
            told.set()

    with pytest.raises(TrainingCancelled):
        run(tmp_path, on_event=cancel_after_the_first_epoch, cancelled=told.is_set, **settings)
    assert checkpoints(tmp_path) == []
    result = run(tmp_path, on_event=again.append, **settings)
    assert again[0]["step"] == 0
    assert [epoch["epoch"] for epoch in result.history] == list(range(1, 16))
    assert result.best_epoch == 15
    assert len(checkpoints(tmp_path)) == 1


def checkpoints(folder):
    return [path for path in (folder / "checkpoints" / "run").glob("checkpoint_*") if path.is_dir()]


def test_a_job_in_a_thread_is_cancelled_together_and_goes_on_when_called_again(tmp_path):
    write_rows(tmp_path, num_rows=200)
    settings = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 4}
    events, told = [], threading.Event()

    def note(event):
        events.append(event)
        if event["step"] > 6:
            told.set()

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, tmp_path, on_event=note, cancelled=told.is_set, **settings)
        with pytest.raises(TrainingCancelled, match=r"after step \d+"):
            job.result()
        wait_until_free()
        again = []
        finished = pool.submit(run, tmp_path, on_event=again.append, **settings).result()
    assert events[-1]["step"] < finished.steps
    # Steps that are saved: every fifth, and the last of each epoch of 13.
    assert again[0]["step"] in {5, 10, 13, 15, 20, 25, 26, 30, 35, 39, 40, 45, 50}
    assert again[0]["step"] <= events[-1]["step"] + 1
    assert len(finished.history) == 4


def test_a_job_that_waits_for_room_can_be_cancelled_and_asks_for_nothing_any_more(tmp_path):
    write_rows(tmp_path)
    wait_until_free()
    taken = placement_group([{"CPU": 2}])
    ray.get(taken.ready())
    answers = iter([False, False, True])
    try:
        with pytest.raises(TrainingCancelled, match="before its workers"):
            run(tmp_path, cancelled=lambda: next(answers))
    finally:
        remove_placement_group(taken)
    wait_until_free()
    states = [group["state"] for group in placement_group_table().values()]
    assert set(states) == {"REMOVED"}


def wait_until_free():
    """Wait until both CPUs are free; Ray takes a moment to say so."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


KILLED = """
import os, signal, sys
import ray
from pathlib import Path
sys.path[:0] = [{repository!r}, {tests!r}]
from test_training import WITH_DROPOUT, run
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
         runtime_env={{"env_vars": {{"PYTHONPATH": {repository!r}}}}})
def die(event):
    if event["event"] == "train_step" and event["step"] >= {step}:
        os.kill(os.getpid(), signal.SIGKILL)
run(Path({folder!r}), WITH_DROPOUT, on_event=die, **{settings!r})
"""


@pytest.mark.parametrize(
    ("num_rows", "step", "first_steps", "strategy"),
    [
        # Epochs of 7 steps, killed in the second.
        (50, 8, {8, 15}, {"num_train_epochs": 3}),
        # An epoch of 100 steps, far from its end when it is killed.
        (
            800,
            21,
            {21, 41, 61},
            {"save_strategy": "steps", "save_steps": 20, "num_train_epochs": 1},
        ),
    ],
    ids=["epoch", "steps"],
)
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path, num_rows, step, first_steps, strategy
):
    settings = {"logging_steps": 1, "per_device_train_batch_size": 4, **strategy}
    write_rows(tmp_path / "killed", num_rows)
    write_rows(tmp_path / "whole", num_rows)
    script = KILLED.format(
        repository=str(REPOSITORY),
        tests=str(Path(__file__).parent),
        folder=str(tmp_path / "killed"),
        step=step,
        settings=settings,
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    killed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    events = []
    resumed = run(tmp_path / "killed", WITH_DROPOUT, on_event=events.append, **settings)
    whole = run(tmp_path / "whole", WITH_DROPOUT, **settings)
    assert events[0]["step"] + 1 in first_steps
    measured = ("epoch", "train_loss", "val_loss", "val_exact")
    histories = [
        [{key: epoch[key] for key in measured} for epoch in result.history]
        for result in (resumed, whole)
    ]
    assert histories[0] == histories[1]
    weights = [
        AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32).state_dict()
        for result in (resumed, whole)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
