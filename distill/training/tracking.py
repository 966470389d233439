"""Training's curves for the tools that people watch them in.

TensorBoard's event files are always written, MLflow and Weights & Biases are told where
``train.report_to`` names them, each through its own library and as its own environment
variables say. All of it happens on the driver, from the events of ``job.train``, in a thread
of its own: a tool that is slow or fails is a warning, and nothing to the training.
"""

import contextlib
import functools
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from distill.extras import require
from distill.rundir import RunDir
from distill.training.events import Event
from serve.errors import TrainingCancelled

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
_EXPERIMENT = "raydistill"
# Who waits for an interrupted or failed training waits to see why, not for its curves.
_CLOSE_S, _CLOSE_AT_ONCE_S = 60.0, 2.0
_SCALARS = {
    "train_step": {
        "loss": "loss/train",
        "learning_rate": "learning_rate",
        "tokens_per_s": "tokens_per_s",
        "grad_norm": "grad_norm",
    },
    "train_eval": {"val_loss": "loss/val", "val_exact": "exact"},
}


@dataclass(frozen=True)
class Tracked:
    """The training that is told of.

    Attributes:
        run: Its name, for people.
        identity: Its name, so that a training that goes on goes on there as well.
        directory: The run directory.
        settings: What it is trained with.
    """

    run: str
    identity: str
    directory: RunDir
    settings: Mapping[str, Any] = field(default_factory=dict)


class End(StrEnum):
    """How a training ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    """It was told to stop."""


class Tracker(Protocol):
    """Takes scalars; what it need not do it does nothing for."""

    def start_again(self, step: int) -> None:
        """Training goes on from an earlier step than was noted, perhaps."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Note values after so many steps."""

    def flush(self) -> None:
        """See that what was noted can be read elsewhere."""

    def close(self, end: End) -> None:
        """Note that there is no more to come."""


def check(report_to: Sequence[str]) -> None:
    """See that the libraries are there.

    Raises:
        ConfigurationError: One is not.
    """
    for name in report_to:
        require(name, f"train.report_to={name}", name)


def scalars(event: Event) -> dict[str, float]:
    """What an event of training has for curves; nothing for most."""
    names = _SCALARS.get(event["event"], {})
    return {
        label: float(event[name]) for name, label in names.items() if event.get(name) is not None
    }


@contextlib.contextmanager
def tracking(
    tracked: Tracked, report_to: Sequence[str], on_trouble: Callable[[str], None]
) -> Iterator[Callable[[Event], None]]:
    """Take the events of a training as they come, and hand them to the tools.

    Args:
        tracked: The training.
        report_to: Names of tools besides TensorBoard.
        on_trouble: Told once of each tool that fails; it is told no more then.

    Yields:
        Takes an event, at once.
    """
    waiting: queue.SimpleQueue[Event | End] = queue.SimpleQueue()
    # A daemon: an interrupted run ends without waiting for a server that does not answer.
    thread = threading.Thread(
        target=_work,
        args=(waiting, tracked, (TENSORBOARD, *report_to), on_trouble),
        name="tracking",
        daemon=True,
    )
    thread.start()
    end = End.FINISHED
    try:
        yield waiting.put
    except BaseException as error:
        told_to = isinstance(error, TrainingCancelled) or not isinstance(error, Exception)
        end = End.KILLED if told_to else End.FAILED
        raise
    finally:
        waiting.put(end)
        thread.join(_CLOSE_S if end is End.FINISHED else _CLOSE_AT_ONCE_S)
        if thread.is_alive():
            on_trouble("The curves of this training are still under way to their tools.")


def _work(
    waiting: "queue.SimpleQueue[Event | End]",
    tracked: Tracked,
    names: Sequence[str],
    on_trouble: Callable[[str], None],
) -> None:
    """Hand events to the tools until the training ends."""
    # Made at the first event: a student that is there already has nothing to tell.
    trackers: dict[str, Tracker] | None = None
    while not isinstance(event := waiting.get(), End):
        if trackers is None:
            trackers = {}
            for name in names:
                with _no_harm(name, trackers, on_trouble):
                    trackers[name] = _TRACKERS[name](tracked, event["step"])
        elif event["event"] == "train_start":
            for name, tracker in list(trackers.items()):
                with _no_harm(name, trackers, on_trouble):
                    tracker.start_again(event["step"])
        for name, tracker in list(trackers.items()):
            with _no_harm(name, trackers, on_trouble):
                if found := scalars(event):
                    tracker.log(found, event["step"])
                # Each epoch ends with one.
                if event["event"] == "train_eval":
                    tracker.flush()
    for name, tracker in list((trackers or {}).items()):
        with _no_harm(name, {}, on_trouble):
            tracker.close(event)


@contextlib.contextmanager
def _no_harm(
    name: str, trackers: dict[str, Tracker], on_trouble: Callable[[str], None]
) -> Iterator[None]:
    """Warn of whatever a tool raises, and go on without it."""
    try:
        yield
    except Exception as error:
        trackers.pop(name, None)
        logger.warning("%s fails", name, exc_info=True)
        reason = str(error).strip().split("\n")[0]
        on_trouble(f"{name} is told no more: {type(error).__name__}: {reason}")


class _TensorBoard(Tracker):
    def __init__(self, tracked: Tracked, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._directory = tracked.directory
        self._name = f"{TENSORBOARD}/{tracked.identity}"
        self._temporary = None
        folder = Path(self._directory.join(self._name))
        if not self._directory.is_local:
            self._temporary = tempfile.TemporaryDirectory(prefix="raydistill-")
            folder = Path(self._temporary.name)
        self._folder = folder
        self._make_writer = functools.partial(SummaryWriter, str(folder))
        self._writer = self._written_from(step)

    def _written_from(self, step: int) -> Any:
        # What was written before of steps that are done again counts no more. The suffix keeps
        # two files of one second apart.
        return self._make_writer(purge_step=step + 1, filename_suffix=f".{time.time_ns()}")

    def start_again(self, step: int) -> None:
        self._writer.close()
        self._writer = self._written_from(step)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        if self._temporary:
            self._directory.put_files(self._folder, self._name)

    def close(self, end: End) -> None:
        self._writer.close()
        self.flush()
        if self._temporary:
            self._temporary.cleanup()


class _MLflow(Tracker):
    def __init__(self, tracked: Tracked, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        self._client = MlflowClient()
        experiment = _mlflow_experiment(self._client)
        tag = "raydistill.student"
        found = self._client.search_runs(
            [experiment], f"tags.`{tag}` = '{tracked.identity}'", max_results=1
        )
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {tag: tracked.identity, MLFLOW_RUN_NAME: tracked.run}
        self._run = self._client.create_run(experiment, tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in tracked.settings.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, end: End) -> None:
        self._client.set_terminated(self._run, status=end.value)


def _mlflow_experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


class _WandB(Tracker):
    def __init__(self, tracked: Tracked, step: int) -> None:
        import wandb

        self._temporary = tempfile.TemporaryDirectory(prefix="raydistill-")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _EXPERIMENT),
            name=tracked.run,
            id=tracked.identity,
            resume="allow",
            reinit="create_new",
            config=dict(tracked.settings),
            dir=os.environ.get("WANDB_DIR", self._temporary.name),
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, end: End) -> None:
        self._run.finish(exit_code=0 if end is End.FINISHED else 1)
        self._temporary.cleanup()


_TRACKERS: dict[str, Callable[[Tracked, int], Tracker]] = {
    TENSORBOARD: _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}
