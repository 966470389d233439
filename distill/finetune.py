"""One fine-tuning: rows in, a student directory out; nothing where that student is there.

Shared by the pipeline and the DSPy provider. Training is ``training.job``, the directory's
contents are ``export``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distill import export, preflight, summary
from distill.config import StudentConfig, TrainConfig
from distill.export import Profile
from distill.fingerprints import fingerprint
from distill.progress import ProgressReporter
from distill.rundir import RunDir


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
    """

    train_rows: str
    val_rows: str
    rows_fingerprint: str
    student: StudentConfig
    train: TrainConfig
    profile: Profile
    directory: RunDir
    folder: str | None = None

    def identity(self) -> str:
        """Changes with whatever makes the student another one."""
        recipe = self.train.model_dump(exclude={"logging_steps", "save_steps", "use_gpu"})
        profile = [self.profile.to_json(), self.profile.fingerprint]
        base = [self.student.model_dump(), preflight.base_fingerprint(self.student.model)]
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
        ConfigurationError: The base model cannot be used.
        TrainingError: Training failed.
        TrainingCancelled: ``cancelled`` said so.
    """
    from distill.training.job import train

    with progress.stage("train") as stage:
        if job.is_done():
            stage.update(1, 1, "the student is up to date")
            return
        identity = job.identity()
        use_gpu = preflight.use_gpu(job.train)
        result: Any = train(
            train_rows=job.train_rows,
            val_rows=job.val_rows,
            student=job.student,
            train=job.train.model_copy(update={"use_gpu": use_gpu}),
            storage=job.directory.join("checkpoints"),
            name=identity[:12],
            on_event=summary.show_training(stage, progress),
            cancelled=cancelled,
        )
        export.write_student(
            job.directory, job.student_folder(), job.profile, job.student.model, result, identity
        )
        stage.update(1, 1, summary.describe_training(result))
