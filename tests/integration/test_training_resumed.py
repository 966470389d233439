"""Training that is cancelled or killed, and goes on, on a real local Ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from transformers import AutoModelForCausalLM

from serve.errors import TrainingCancelled
from tests.training_runs import WITH_DROPOUT, run, write_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

REPOSITORY = Path(__file__).parents[2]


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
        with pytest.raises(TrainingCancelled, match="waited for room"):
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
sys.path.insert(0, {repository!r})
from tests.training_runs import WITH_DROPOUT, run
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
noted = Path({folder!r}, "checkpoints", "run", "checkpoint_manager_snapshot.json")
def die(event):
    # A checkpoint is one from when Ray Train has noted it, which is a moment after its step.
    saved = noted.exists() and "checkpoint_dir_name" in noted.read_text()
    if event["event"] == "train_step" and event["step"] >= {step} and saved:
        os.kill(os.getpid(), signal.SIGKILL)
run(Path({folder!r}), WITH_DROPOUT, on_event=die, **{settings!r})
"""


@pytest.mark.parametrize(
    ("num_rows", "step", "saved", "strategy"),
    [
        # Far from the end, since the workers train on for a while without their driver.
        (400, 51, range(50, 300, 50), {"num_train_epochs": 6}),
        (800, 21, range(20, 100, 20), {"save_strategy": "steps", "save_steps": 20}),
    ],
    ids=["epoch", "steps"],
)
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path, num_rows, step, saved, strategy
):
    settings = {
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        **strategy,
    }
    write_rows(tmp_path / "killed", num_rows)
    write_rows(tmp_path / "whole", num_rows)
    script = KILLED.format(
        repository=str(REPOSITORY), folder=str(tmp_path / "killed"), step=step, settings=settings
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    killed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    events = []
    resumed = run(tmp_path / "killed", WITH_DROPOUT, on_event=events.append, **settings)
    whole = run(tmp_path / "whole", WITH_DROPOUT, **settings)
    assert events[0]["step"] in saved
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
