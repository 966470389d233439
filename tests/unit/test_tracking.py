"""Training's curves as their tools receive them."""

import contextlib
import struct
import sys
import threading
import types
from pathlib import Path

import pytest

from distill.rundir import RunDir
from distill.training.tracking import Tracked, check, scalars, tracking
from serve.errors import ConfigurationError, TrainingCancelled, TrainingError

STEP = {
    "event": "train_step",
    "step": 1,
    "loss": 2.0,
    "learning_rate": 1e-3,
    "tokens_per_s": 100.0,
    "grad_norm": None,
}
EVAL = {"event": "train_eval", "step": 2, "val_loss": 1.5, "val_exact": 0.25}
START = {"event": "train_start", "step": 0}
EPOCH = {"event": "train_epoch", "step": 2, "epoch": 1}


def test_an_event_has_the_scalars_that_are_known():
    assert scalars(STEP) == {"loss/train": 2.0, "learning_rate": 1e-3, "tokens_per_s": 100.0}
    assert scalars(EVAL) == {"loss/val": 1.5, "exact": 0.25}
    assert scalars({**EVAL, "val_loss": None, "val_exact": None}) == {}
    assert scalars(EPOCH) == {}


def events_in(folder: Path):
    """The events of all event files, in the order that TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            # A TFRecord: length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of all event files, as tag -> (step, value) pairs."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_in(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def unpurged(folder: Path) -> dict[str, list[int]]:
    """The steps of each tag that TensorBoard shows: a session's start takes back later ones."""
    from tensorboardX.proto.event_pb2 import SessionLog

    found: dict[str, list[int]] = {}
    for event in events_in(folder):
        if event.session_log.status == SessionLog.START:
            found = {tag: [s for s in steps if s < event.step] for tag, steps in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(event.step)
    return found


def track(directory, events, report_to=(), identity="abc", error=None):
    troubles = []
    tracked = Tracked(run="mine", identity=identity, directory=directory, settings={"seed": 0})
    with tracking(tracked, report_to, troubles.append) as take:
        for event in events:
            take(event)
        if error:
            raise error
    return troubles


def step(number):
    return {**STEP, "step": number}


@pytest.mark.parametrize("again_in", ["one driver", "another"])
@pytest.mark.parametrize("at", [0, 10])
def test_steps_that_are_done_again_are_in_tensorboard_once(tmp_path, at, again_in):
    steps = [step(10), step(20), step(30)]
    first, again = [START, *steps], [{**START, "step": at}, *steps[at // 10 :]]
    sessions = [[*first, *again]] if again_in == "one driver" else [first, again]
    for session in sessions:
        assert track(RunDir(str(tmp_path)), session) == []
    assert unpurged(tmp_path / "tensorboard" / "abc")["loss/train"] == [10, 20, 30]


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


def test_a_remote_run_directory_has_the_curves_from_each_evaluation_on(monkeypatch):
    evaluated = threading.Event()

    def log(scalars, step):
        if step == EVAL["step"]:
            evaluated.set()

    # Told after TensorBoard.
    run = types.SimpleNamespace(log=log, finish=lambda exit_code: None)
    module = types.SimpleNamespace(init=lambda **settings: run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    directory = RunDir("memory://tracked/evaluated")
    tracked = Tracked(run="mine", identity="abc", directory=directory)
    with tracking(tracked, ["wandb"], pytest.fail) as take:
        take(STEP)
        take(EVAL)
        assert evaluated.wait(30)
        assert directory._fs.ls("/tracked/evaluated/tensorboard/abc", detail=False)


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


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_folder_of_a_tools_name_is_not_its_package(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigurationError, match=f"the package {name}, which is not installed"):
        check([name])


ENDS = [
    (None, "FINISHED", 0),
    (TrainingError("out of memory"), "FAILED", 1),
    (TrainingCancelled("told to"), "KILLED", 1),
    (KeyboardInterrupt(), "KILLED", 1),
]


@pytest.mark.parametrize(("error", "status", "exit_code"), ENDS)
def test_tools_are_told_how_training_ended(tmp_path, monkeypatch, error, status, exit_code):
    told = {}
    run = types.SimpleNamespace(log=lambda scalars, step: None, finish=told.update)
    wandb = types.SimpleNamespace(init=lambda **settings: run)
    known = types.SimpleNamespace(experiment_id="1", info=types.SimpleNamespace(run_id="2"))
    client = types.SimpleNamespace(
        get_experiment_by_name=lambda name: known,
        search_runs=lambda *query, max_results: [known],
        update_run=lambda run, status: None,
        log_metric=lambda run, name, value, step: None,
        set_terminated=lambda run, status: told.update(status=status),
    )
    modules = {"": {"MlflowClient": lambda: client}, ".entities": {"Param": dict}}
    modules |= {".utils": {}, ".utils.mlflow_tags": {"MLFLOW_RUN_NAME": "name"}}
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name, names in modules.items():
        monkeypatch.setitem(sys.modules, f"mlflow{name}", types.SimpleNamespace(**names))
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        track(RunDir(str(tmp_path)), [START, STEP], ["mlflow", "wandb"], error=error)
    assert told == {"status": status, "exit_code": exit_code}


def test_mlflow_holds_one_run_of_a_training_that_went_on(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    directory = RunDir(str(tmp_path / "run"))
    assert track(directory, [STEP], ["mlflow"]) == []
    assert track(directory, [{**STEP, "step": 3, "loss": 1.0}, EVAL], ["mlflow"]) == []
    with pytest.raises(TrainingError):
        track(directory, [STEP], ["mlflow"], identity="def", error=TrainingError("no"))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("raydistill")
    failed, run = client.search_runs([experiment.experiment_id])
    assert failed.info.status == "FAILED"
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


@pytest.mark.parametrize("error", [TrainingError("out of memory"), KeyboardInterrupt()])
def test_a_failure_does_not_wait_long_for_a_tool_that_hangs(tmp_path, monkeypatch, error):
    answer = threading.Event()
    module = types.SimpleNamespace(init=lambda **settings: answer.wait(30))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("distill.training.tracking._CLOSE_S", threading.TIMEOUT_MAX)
    monkeypatch.setattr("distill.training.tracking._CLOSE_AT_ONCE_S", 0.05)
    before = set(threading.enumerate())
    with pytest.raises(type(error)):
        track(RunDir(str(tmp_path)), [START, STEP], ["wandb"], error=error)
    answer.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
