"""The errors that raydistill raises on purpose.

Each is a ``DistillError`` and also the standard type a caller would expect, and each
survives pickling, since Ray carries errors between processes. A message gives what was
found, what was expected and the remedy. Which exit code an error ends in is decided by
the command line, from ``exit_code``.
"""

from collections.abc import Sequence


class DistillError(Exception):
    """Base of every error that raydistill raises on purpose."""

    exit_code = 1


class ConfigurationError(DistillError, ValueError):
    """A configuration, a data file or another input that cannot work as given."""

    exit_code = 2


class TracingError(DistillError, RuntimeError):
    """Tracing ended without what the next stage needs."""


class TraceStoreError(DistillError, RuntimeError):
    """The trace store on disk does not hold what it should."""


class StorageError(DistillError, RuntimeError):
    """There is no room for what a run leaves behind."""


class BudgetExceeded(DistillError, RuntimeError):
    """The run stopped at its budget; running it again goes on from there."""

    exit_code = 3


class CallPrevented(DistillError, RuntimeError):
    """An LM call that was not made, since no call of the run is made any more.

    Args:
        message: Why, in words.
        stop: Names why.
    """

    def __init__(self, message: str, stop: str = "") -> None:
        super().__init__(message, stop)
        self.stop = stop

    def __str__(self) -> str:
        return str(self.args[0])


class TrainingError(DistillError, RuntimeError):
    """Training could not start, or did not end with a student."""


class TrainingDiverged(TrainingError):
    """The loss of some rows is not a number.

    Args:
        message: What was found, in words.
        rows: Which of the rows trained on.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message, rows)
        self.rows = rows

    def __str__(self) -> str:
        return str(self.args[0])


class TrainingCancelled(DistillError, RuntimeError):
    """Training was told to stop, and did; the same call goes on from what was saved."""


class StudentError(DistillError, RuntimeError):
    """A student directory that cannot be loaded or served."""
