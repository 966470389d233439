"""A student that is chosen by the program's own metric, through the command line."""

import json

import pytest

from examples.standin_teacher import serve_in_background
from tests.runs import MoodTeacher, RunFolder

pytestmark = pytest.mark.integration


def test_the_kept_checkpoint_that_scores_best_on_the_dev_set_becomes_the_student(tmp_path):
    changes = {
        "train": {
            "num_train_epochs": 4,
            "learning_rate": 1e-2,
            "select_by": "metric",
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
        }
    }
    with serve_in_background(MoodTeacher()) as server:
        folder = RunFolder(tmp_path, server.api_base, changes)
        process = folder.raydistill("run")
        assert process.returncode == 0, process.stdout
        refused = folder.raydistill("check", "metric=null")
    training = json.loads((folder.run_dir / "report.json").read_text())["training"]
    scores = [candidate["metric"] for candidate in training["candidates"]]
    assert len(scores) >= 2
    assert scores == sorted(scores, reverse=True)
    assert training["best_step"] == training["candidates"][0]["step"]
    assert "Metric on the dev set" in process.stdout
    assert "chosen by the program&#39;s metric" in (folder.run_dir / "report.html").read_text()
    assert list((folder.run_dir / "tensorboard").rglob("events.out.tfevents.*"))
    assert not (folder.run_dir / "candidates").exists()
    assert refused.returncode == 2, refused.stdout
    assert "train.select_by=metric chooses by the program's metric" in " ".join(
        refused.stdout.split()
    )
