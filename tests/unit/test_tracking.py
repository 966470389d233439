"""Training's curves as their tools receive them."""

import struct
import sys
import threading
import types
from pathlib import Path

import pytest

from distill.rundir import RunDir
from distill.training.tracking import Tracked, check, scalars, tracking
from serve.errors import ConfigurationError

STEP = {
    "event": "train_step",
    "step": 1,
    "loss": 2.0,
    "learning_rate": 1e-3,
    "tokens_per_s": 100.0,
    "grad_norm": None,
}
EVAL = {"event": "train_eval", "step": 2, "val_loss": 1.5, "val_exact": 0.25}
EPOCH = {"event": "train_epoch", "step": 2, "epoch": 1}


def test_an_event_has_the_scalars_that_are_known():
    assert scalars(STEP) == {"loss/train": 2.0, "learning_rate": 1e-3, "tokens_per_s": 100.0}
    assert scalars(EVAL) == {"loss/val": 1.5, "exact": 0.25}
    assert scalars({**EVAL, "val_loss": None, "val_exact": None}) == {}
    assert scalars(EPOCH) == {}


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of all event files, as tag -> (step, value) pairs."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            # A TFRecord: length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += 16 + length
    return found


def track(directory, events, report_to=(), identity="abc"):
    troubles = []
    tracked = Tracked(run="mine", identity=identity, directory=directory, settings={"seed": 0})
    with tracking(tracked, report_to, troubles.append) as take:
        for event in events:
            take(event)
    return troubles


def test_tensorboards_files_hold_the_curves(tmp_path):
    assert track(RunDir(str(tmp_path)), [STEP, EVAL, EPOCH]) == []
    found = written(tmp_path / "tensorboard" / "abc")
    assert found["loss/train"] == [(1, 2.0)]
    assert found["loss/val"] == [(2, 1.5)]
    assert found["exact"] == [(2, 0.25)]


def test_a_remote_run_directory_gets_tensorboards_files_as_well(tmp_path):
    directory = RunDir("memory://tracked/run")
    assert track(directory, [STEP, EVAL, EPOCH]) == []
    local = tmp_path / "copy"
    local.mkdir()
    for path in directory._fs.ls("/tracked/run/tensorboard/abc", detail=False):
        directory._fs.get_file(path, str(local / Path(path).name))
    assert written(local)["loss/train"] == [(1, 2.0)]


def test_without_an_event_nothing_is_written(tmp_path):
    track(RunDir(str(tmp_path)), [])
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_fails_is_a_warning_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    troubles = track(RunDir(str(tmp_path)), [STEP, EVAL], report_to=["wandb"])
    assert len(troubles) == 1
    assert troubles[0].startswith("wandb is told no more: ModuleNotFoundError")
    assert written(tmp_path / "tensorboard" / "abc")["loss/val"] == [(2, 1.5)]


def test_a_tool_without_its_package_is_an_error_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'raydistill\[mlflow\]'"):
        check(["mlflow"])
    check([])


def test_mlflow_holds_one_run_of_a_training_that_went_on(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    directory = RunDir(str(tmp_path / "run"))
    assert track(directory, [STEP], ["mlflow"]) == []
    assert track(directory, [{**STEP, "step": 3, "loss": 1.0}, EVAL], ["mlflow"]) == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("raydistill")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0"}
    losses = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 2.0), (3, 1.0)]


def test_weights_and_biases_are_told_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert track(RunDir(str(tmp_path / "run")), [STEP, EVAL], ["wandb"]) == []
    assert list(tmp_path.glob("wandb/offline-run-*-abc/*.wandb"))


def test_a_tool_that_hangs_is_left_behind(tmp_path, monkeypatch):
    answer = threading.Event()
    module = types.SimpleNamespace(init=lambda **settings: answer.wait(30))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("distill.training.tracking._CLOSE_S", 0.05)
    before = set(threading.enumerate())
    (trouble,) = track(RunDir(str(tmp_path)), [STEP], ["wandb"])
    assert "still under way" in trouble
    answer.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
