"""Which student a training ends with, when it ends early, and that lost workers change neither."""

import os
import signal

import psutil
import pytest

from distill.training.choice import quality
from tests.training_runs import WITH_DROPOUT, run, write_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

MEASURED = ("step", "epoch", "train_loss", "val_loss", "val_exact")


def measured(result):
    return [{key: each[key] for key in MEASURED} for each in result.evaluations]


def kill_a_worker():
    """Kill one training worker of this process's own Ray."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError("no training worker to kill")


def test_within_an_epoch_the_best_by_loss_is_kept_and_a_lost_worker_changes_nothing(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 5,
        "select_by": "loss",
        "save_total_limit": 2,
        "logging_steps": 1,
        "num_train_epochs": 2,
    }
    events, killed = [], []
    for name in ("whole", "killed"):
        write_rows(tmp_path / name, num_rows=200)

    def kill_once(event):
        events.append(event)
        if event["event"] == "train_step" and event["step"] >= 16 and not killed:
            killed.append(event["step"])
            kill_a_worker()

    whole = run(tmp_path / "whole", WITH_DROPOUT, **settings)
    again = run(tmp_path / "killed", WITH_DROPOUT, on_event=kill_once, **settings)
    assert sum(event["event"] == "train_start" for event in events) == 2
    assert measured(again) == measured(whole)
    assert [each["step"] for each in whole.evaluations] == [4, 8, 12, 13, 16, 20, 24, 26]
    best = sorted(whole.evaluations, key=lambda each: quality(each, "loss"), reverse=True)
    assert [each.step for each in whole.candidates][:2] == [each["step"] for each in best[:2]]
    assert whole.val_loss == best[0]["val_loss"]
    assert sum(epoch["steps"] for epoch in whole.history) == whole.steps == 26


def test_training_ends_once_patience_does_and_stays_ended_when_called_again(tmp_path):
    write_rows(tmp_path, num_rows=100)
    # So large a rate that the first evaluation is the best there will be.
    settings = {
        "learning_rate": 1.0,
        "early_stopping_patience": 2,
        "select_by": "loss",
        "num_train_epochs": 50,
    }
    events, again = [], []
    result = run(tmp_path, on_event=events.append, **settings)
    assert result.stopped_early
    assert len(result.evaluations) - result.best_epoch == 2
    assert [event["event"] for event in events].count("train_stop") == 1
    assert events[-1]["event"] == "train_stop"
    assert run(tmp_path, on_event=again.append, **settings) == result
    assert again == []
