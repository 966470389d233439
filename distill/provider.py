"""``RayProvider``: DSPy's provider contract, kept with Ray Train and Ray Serve.

    lm = dspy.LM("raydistill/<model>", provider=RayProvider())
    job = lm.finetune(train_data, TrainDataFormat.CHAT, {"learning_rate": 1e-4})
    student = job.result()
    student.launch()

Owns what DSPy asks of a provider and of its training jobs. Training is ``finetune``, what
serves a launched student is ``serve.launch``, how an LM reaches it is ``serve.dspy_lm``.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dspy
from dspy.clients.provider import Provider
from dspy.clients.utils_finetune import TrainDataFormat
from rich.console import Console

from distill import cluster, preflight
from distill.chats import check_chat
from distill.config import ScratchConfig, StudentConfig, TrainConfig
from distill.config_file import validated
from distill.export import Profile
from distill.finetune import FineTuning, fine_tune
from distill.finetune_job import RayTrainingJob, turn
from distill.fingerprints import fingerprint
from distill.progress import ProgressReporter, open_events
from distill.rows import Messages, Row, fold_row
from distill.rundir import RunDir
from distill.train_kwargs import TrainKwargs, parse_train_kwargs
from distill.turns import plain
from serve.dspy_lm import PROVIDER, model_name, register, student_of
from serve.errors import ConfigurationError, TrainingError
from serve.models import full_name

logger = logging.getLogger(__name__)

register()


class TrainingRows(list[dict[str, Any]]):
    """Training data as DSPy has it, ``{"messages": [...]}`` each, that also says of what.

    Any provider takes it for the list that it is; ``RayProvider`` uses the rest.

    Attributes:
        train: The rows.
        val: Rows to validate on.
        profile: The predictors whose calls these are, and how they fold.
    """

    def __init__(
        self, train: Sequence[Row], val: Sequence[Row] = (), profile: Profile | None = None
    ) -> None:
        super().__init__({"messages": plain(row.messages)} for row in train)
        self.train, self.val = list(train), list(val)
        self.profile = profile or Profile()

    @classmethod
    def read(cls, data: Sequence[Mapping[str, Any]]) -> "TrainingRows":
        """Training data of any origin.

        Raises:
            ConfigurationError: It is not what DSPy calls the chat format, or nothing can be
                learned from a row.
        """
        if isinstance(data, cls):
            return data
        for number, row in enumerate(data):
            if not isinstance(row, Mapping) or "messages" not in row:
                raise ConfigurationError(
                    f"train_data[{number}]: expected {{'messages': [...]}} that end with the "
                    f"assistant's, found {str(row)[:200]}."
                )
            check_chat(f"train_data[{number}]", row["messages"], tools=True)
        return cls([Row(row["messages"], "", "", folded=False) for row in data])


class RayProvider(Provider):
    """Fine-tunes on Ray Train, launches on Ray Serve.

    Args:
        storage: Local folder or fsspec URI for rows, checkpoints and students, unless
            ``train_kwargs`` name an ``output_dir``. All nodes must reach it. Each student has
            a folder of its own below ``students/`` there, named by what made it.
        name: The run's folder in it.
        scratch: Sizes of a micro-student, as ``student.scratch`` of a configuration file.

    Raises:
        ConfigurationError: One of them is not what it should be.
    """

    def __init__(
        self,
        *,
        storage: str = "runs",
        name: str = "finetuned",
        scratch: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = RayTrainingJob
        self._storage, self._name = storage, name
        self._scratch = validated(ScratchConfig, scratch or {}, "scratch")

    @staticmethod
    def is_provider_model(model: str) -> bool:
        """Whether a model's name says that it is one of this provider's."""
        return model.startswith(f"{PROVIDER}/")

    def check(
        self,
        model: str,
        train_kwargs: Mapping[str, Any],
        prompts: Sequence[Messages] = (),
    ) -> TrainKwargs:
        """See that a fine-tuning can be made as asked, before anything is paid for it.

        Args:
            model: As for ``finetune``.
            train_kwargs: As for ``finetune``.
            prompts: Full prompts that the model's chat template has to render.

        Raises:
            ConfigurationError: It cannot.
        """
        base = full_name(student_of(model))
        kwargs = parse_train_kwargs(train_kwargs, base)
        if kwargs.train.select_by == "metric":
            raise ConfigurationError(
                "train_kwargs['select_by']='metric': a fine-tuning job knows rows, and no program "
                "to run its metric on. Use 'exact' or 'loss', or raydistill run with a "
                "configuration file."
            )
        preflight.check_training(StudentConfig(model=base), kwargs.train, prompts)
        self._directory(kwargs).create()
        return kwargs

    def finetune(
        self,
        job: RayTrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None = None,
        train_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Fine-tune a model on conversations, and wait for the end.

        Args:
            job: Asked whether it was cancelled.
            model: ``raydistill/`` and ``scratch``, a Hugging Face directory or id.
            train_data: Conversations that end with the assistant, ``{"messages": [...]}``.
            train_data_format: Chat.
            train_kwargs: See ``parse_train_kwargs``.

        Returns:
            The name of the student, as an LM's model.

        Raises:
            ConfigurationError: Something asked for cannot be had.
            TrainingError: Training failed.
            TrainingCancelled: The job was cancelled.
        """
        _check_format(train_data_format)
        rows = TrainingRows.read(train_data)
        if not rows:
            raise TrainingError("train_data is empty: there is nothing to train on.")
        base = full_name(student_of(model))
        kwargs = self.check(model, train_kwargs or {})
        directory = self._directory(kwargs)

        # Imported here: it brings Ray Serve, which LMs that only answer do not need.
        from serve import temporary

        with turn(job), directory.locked(), cluster.connected(), reporting(directory) as progress:
            temporary.sweep()
            train = preflight.fitted_workers(kwargs.train)
            preflight.check_workers(train)
            task = self._prepare(base, rows, train, directory, progress)
            try:
                fine_tune(task, progress, job.is_cancelling)
            except KeyboardInterrupt as error:
                # DSPy's thread would let it pass, and whoever waits for the job wait for ever.
                raise TrainingError("Training was interrupted.") from error
        return model_name(directory.join(task.student_folder()))

    def launch(self, lm: dspy.LM, launch_kwargs: Mapping[str, Any] | None = None) -> None:
        """Deploy the LM's student on Ray Serve; nothing where it is deployed already.

        Args:
            lm: Its calls go to the deployment from now on, in this process and in every one
                that is connected to the same Ray.
            launch_kwargs: Fields of ``serve.deployments.Scale``.

        Raises:
            ConfigurationError: A setting is wrong, or the cluster has no room.
            StudentError: The student cannot be loaded.
        """
        from serve.launch import launch

        launch(student_of(lm.model), **{**(lm.launch_kwargs or {}), **(launch_kwargs or {})})

    def kill(self, lm: dspy.LM, launch_kwargs: Mapping[str, Any] | None = None) -> None:
        """Take the LM's student down, and whatever ``launch`` started for it; see ``launch``."""
        from serve.launch import kill

        kill(student_of(lm.model))

    def _directory(self, kwargs: TrainKwargs) -> RunDir:
        return RunDir(kwargs.output_dir or f"{self._storage}/{self._name}")

    def _prepare(
        self,
        base: str,
        data: TrainingRows,
        train: TrainConfig,
        directory: RunDir,
        progress: ProgressReporter,
    ) -> FineTuning:
        """Write the rows, folded if they can be."""
        folding = data.profile.folding
        rows = {"train": data.train, "val": data.val}
        if folding:
            rows = {name: [fold_row(row, folding) for row in some] for name, some in rows.items()}
            folded = sum(row.folded for some in rows.values() for row in some)
            progress.note(f"  {folded} of {sum(map(len, rows.values()))} rows folded")
        split = {name: [row.to_json() for row in some] for name, some in rows.items()}
        identity = fingerprint(split)
        paths = {name: f"rows/{identity[:12]}/{name}.jsonl" for name in split}
        for name, lines in split.items():
            directory.write_jsonl(paths[name], lines)
        return FineTuning(
            train_rows=directory.join(paths["train"]),
            val_rows=directory.join(paths["val"]),
            rows_fingerprint=identity,
            student=StudentConfig(
                model=base, prompt="folded" if folding else "full", scratch=self._scratch
            ),
            train=train,
            profile=data.profile,
            directory=directory,
        )


@contextlib.contextmanager
def reporting(directory: RunDir) -> Iterator[ProgressReporter]:
    """Progress on this terminal or notebook, and in the run directory's events."""
    with directory.appending("events.jsonl") as path, open_events(path) as events:
        yield ProgressReporter(Console(stderr=True), events)


def _check_format(given: TrainDataFormat | str | None) -> None:
    if given not in (None, TrainDataFormat.CHAT):
        raise ConfigurationError(
            f"train_data_format={given!r}: expected {TrainDataFormat.CHAT.value!r}, which is "
            "messages that end with the assistant's."
        )
