"""The terminal, kept for people: everybody else's output goes to a log file.

Ray, DeepSpeed and torch print from threads and native code, so the split is made at the
file descriptors: ours is a copy of the terminal's, theirs are pointed at the log.
"""

import contextlib
import logging
import os
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

STDOUT, STDERR = 1, 2


class Terminal:
    """What a person reads. With ``verbose`` nothing is redirected.

    Attributes:
        log: Where other output goes, once ``log_to`` or ``silence`` has said so.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self.log: Path | None = None
        self._verbose = verbose
        self._saved = (os.dup(STDOUT), os.dup(STDERR))
        self._out = os.fdopen(os.dup(STDOUT), "w", encoding="utf-8", buffering=1)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A log that cannot be written must not hide why the command has ended.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for saved, number in zip(self._saved, (STDOUT, STDERR), strict=True):
            os.dup2(saved, number)
            os.close(saved)
        self._out.close()

    @cached_property
    def console(self) -> "Console":
        """A rich console on the terminal."""
        from rich.console import Console

        return Console(file=self._out)

    def say(self, text: str) -> None:
        """Print one message as it is."""
        print(text, file=self._out, flush=True)

    def log_to(self, path: Path | None) -> None:
        """From now on, send everything that is not said here to a file.

        Args:
            path: The file; None makes one among the temporary files.
        """
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="raydistill-")) / "log.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        if self._verbose:
            return
        self.log = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, STDOUT)
        os.dup2(descriptor, STDERR)
        os.close(descriptor)

    def silence(self) -> None:
        """``log_to`` a temporary file."""
        self.log_to(None)
