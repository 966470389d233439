"""One fine-tuning: rows in, a student directory out; nothing where that student is there.

Shared by the pipeline and the DSPy provider. Training is ``training.job``, the directory's
contents are ``export``, what a program scores with a checkpoint is the pipeline's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from distill import export, preflight, provenance, summary
from distill.config import StudentConfig, TrainConfig
from distill.export import Profile
from distill.fingerprints import fingerprint
from distill.progress import ProgressReporter, Stage
from distill.rundir import RunDir
from distill.training import tracking
from serve.errors import TrainingError

_CANDIDATES = "candidates"

# Whether another value would train another student; the later keys only where they are used,
# so that a run from before them goes on.
_NOT_NAMING = {"logging_steps", "save_steps", "use_gpu", "report_to"}
_ALWAYS_NAMING = {
    *("num_workers", "zero_stage", "learning_rate", "lr_scheduler_type", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "warmup_ratio"),
    *("weight_decay", "max_grad_norm", "max_length", "prompt_loss_weight", "bf16"),
    *("save_strategy", "seed", "deepspeed"),
}

ScoreStudents = Callable[[Sequence[tuple[str, str]]], list[tuple[float, float]]]
"""Student directories, each with what names it, to what the program scores with each and what
finding that out has cost in USD."""


@dataclass(frozen=True)
class FineTuning:
    """What is to be trained, and where it goes.

    Attributes:
        train_rows, val_rows: Rows files; the second may be empty.
        rows_fingerprint: Of both files' contents.
        student: The base model.
        train: The recipe.
        profile: What the student's directory says besides.
        directory: The run directory.
        folder: The student's name in it; None names it by its identity, below ``students/``.
        score: Asked where ``select_by`` is ``metric``.
    """

    train_rows: str
    val_rows: str
    rows_fingerprint: str
    student: StudentConfig
    train: TrainConfig
    profile: Profile
    directory: RunDir
    folder: str | None = None
    score: ScoreStudents | None = None

    def identity(self) -> str:
        """Changes with whatever makes the student another one."""
        recipe = {
            key: value
            for key, value in self.train.model_dump(exclude=_NOT_NAMING).items()
            if key in _ALWAYS_NAMING or value != type(self.train).model_fields[key].default
        }
        profile = [self.profile.to_json(), self.profile.fingerprint]
        # A size only stands for the others.
        student = self.student.model_dump(exclude={"scratch": {"size"}})
        if student["lora"] is None:
            del student["lora"]
        base = [student, preflight.base_fingerprint(self.student.model)]
        return fingerprint([self.rows_fingerprint, recipe, profile, base])

    def student_folder(self) -> str:
        """The student directory's name in the run directory."""
        return self.folder or f"students/{self.identity()[:12]}"

    def is_done(self) -> bool:
        """Whether the run directory holds this very student."""
        return export.student_identity(self.directory, self.student_folder()) == self.identity()


def fine_tune(
    job: FineTuning, progress: ProgressReporter, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Train the student and write its directory. Ray is connected.

    Raises:
        ConfigurationError: The base model cannot be used, or the cluster is too small.
        TrainingError: Training failed.
        TrainingCancelled: ``cancelled`` said so.
    """
    with progress.stage("train") as stage:
        if job.is_done():
            stage.update(1, 1, "the student is up to date")
            return
        result = _train(job, stage, progress, cancelled)
        if job.train.select_by != "metric":
            _write(job, result)
        stage.update(1, 1, summary.describe_training(result))
    if job.train.select_by == "metric":
        result = _choose(job, result)
        _write(job, result)
        progress.note(f"  {summary.describe_choice(result)}")
    if result.overfitting:
        progress.note(f"[yellow]{escape(result.overfitting)}[/]")


def _write(job: FineTuning, result: Any, folder: str = "", identity: str = "") -> None:
    """Write the student's directory, or that of one that may become it."""
    export.write_student(
        job.directory,
        folder or job.student_folder(),
        job.profile,
        job.student.model,
        result,
        identity or job.identity(),
        provenance.describe(
            {"train": job.train_rows, "val": job.val_rows}, job.student, _fitted(job.train)
        ),
        ("peft",) if job.student.lora else (),
    )


def _fitted(train: TrainConfig) -> TrainConfig:
    return train.model_copy(update={"use_gpu": preflight.use_gpu(train)})


def _train(
    job: FineTuning, stage: Stage, progress: ProgressReporter, cancelled: Callable[[], bool]
) -> Any:
    from distill.training.job import train

    identity = job.identity()
    show = summary.show_training(stage, progress)
    tracked = tracking.Tracked(
        run=job.directory.uri.rsplit("/", 1)[-1],
        identity=identity[:12],
        directory=job.directory,
        settings={"model": job.student.model, **job.train.model_dump()},
    )

    def warn(text: str) -> None:
        progress.note(f"[yellow]{escape(text)}[/]")

    with tracking.tracking(tracked, job.train.report_to, warn) as track:

        def on_event(event: dict[str, Any]) -> None:
            show(event)
            track(event)

        return train(
            train_rows=job.train_rows,
            val_rows=job.val_rows,
            student=job.student,
            train=_fitted(job.train),
            storage=job.directory.join("checkpoints"),
            name=identity[:12],
            on_event=on_event,
            cancelled=cancelled,
            on_wait=warn,
        )


def _choose(job: FineTuning, result: Any) -> Any:
    """The result with the candidate that the program does best with as its student."""
    if job.score is None:
        raise TrainingError("train.select_by=metric needs a program and a dev set to score it on.")
    identity = job.identity()
    students = []
    for candidate in result.candidates:
        name = f"{identity}-step-{candidate.step}"
        folder = f"{_CANDIDATES}/{name}"
        # A whole student directory: the program's prompts are folded as it says.
        _write(job, result.choosing([candidate]), folder, name)
        students.append((job.directory.join(folder), name))
    scored = [
        replace(candidate, metric=score, cost_usd=cost)
        for candidate, (score, cost) in zip(result.candidates, job.score(students), strict=True)
    ]
    # Stable: of equal scores, the first is the one that is better by exact.
    best_first = sorted(scored, key=lambda candidate: candidate.metric, reverse=True)
    job.directory.remove(_CANDIDATES)
    return result.choosing(best_first)
