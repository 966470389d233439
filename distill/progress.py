"""What a person sees while a stage runs, and the same for machines.

Every stage reports through a ``Stage``: a bar with time left on a terminal, plain lines at
intervals elsewhere, and one JSON line an event in ``events.jsonl``.
"""

import abc
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0
EVENT_EVERY_S = 1.0


class Stage(Protocol):
    """One stage's progress."""

    def update(self, done: int, total: int, text: str = "", **fields: Any) -> None:
        """So many of so many are done; ``text`` says the rest, ``fields`` for machines."""


class ProgressReporter:
    """Shows stages on a console and records them.

    Args:
        console: Where a person looks.
        events: Appends one event somewhere durable; ``open_events`` makes one for a file.
    """

    def __init__(
        self, console: Console, events: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.console = console
        self.events = events or (lambda _: None)

    def note(self, text: str) -> None:
        """Say something once."""
        self.console.print(text)
        self.event("note", text=text)

    def event(self, event: str, **fields: Any) -> None:
        """Record an event for machines only."""
        self.events({"time": round(time.time(), 3), "event": event, **fields})

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage while it lasts; its end says how long it took."""
        start = time.monotonic()
        self.event("stage_start", stage=name)
        make = _BarStage if self.console.is_terminal else _LineStage
        stage = make(self, name)
        try:
            with stage:
                yield stage
        except BaseException as error:
            self.event("stage_failed", stage=name, error=f"{type(error).__name__}: {error}")
            raise
        seconds = time.monotonic() - start
        self.event("stage_end", stage=name, seconds=round(seconds, 3))
        self.console.print(
            f"[green]✓[/] {name:<17}{escape(stage.text)}  [dim]{seconds:.1f} s[/]",
            highlight=False,
            soft_wrap=True,
        )


@contextlib.contextmanager
def open_events(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append events to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as file:

        def write(event: dict[str, Any]) -> None:
            file.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")

        yield write


class _StageBase(abc.ABC):
    """Keeps the latest text and records events at intervals."""

    def __init__(self, reporter: ProgressReporter, name: str) -> None:
        self._reporter, self._name = reporter, name
        self._last_event = 0.0
        self.text = ""

    def __enter__(self) -> "_StageBase":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, done: int, total: int, text: str = "", **fields: Any) -> None:
        self.text = text
        now = time.monotonic()
        if done >= total or now - self._last_event > EVENT_EVERY_S:
            self._last_event = now
            self._reporter.event("progress", stage=self._name, done=done, total=total, **fields)
        self._show(done, total, now)

    @abc.abstractmethod
    def _show(self, done: int, total: int, now: float) -> None:
        """Show so many of so many, now."""


class _BarStage(_StageBase):
    def __init__(self, reporter: ProgressReporter, name: str) -> None:
        super().__init__(reporter, name)
        self._bar = Progress(
            TextColumn("  {task.description:<17}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=reporter.console,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task(name, total=None, text="")

    def __enter__(self) -> "_BarStage":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, done: int, total: int, now: float) -> None:
        self._bar.update(self._task, completed=done, total=total, text=escape(self.text))


class _LineStage(_StageBase):
    def __init__(self, reporter: ProgressReporter, name: str) -> None:
        super().__init__(reporter, name)
        self._first: tuple[float, int] | None = None
        self._last_line = time.monotonic()

    def _show(self, done: int, total: int, now: float) -> None:
        self._first = self._first or (now, done)
        if now - self._last_line < LINE_EVERY_S or done >= total:
            return
        self._last_line = now
        since, before = self._first
        left = (total - done) * (now - since) / (done - before) if done > before else None
        rest = "" if left is None else f", {left:.0f} s left"
        line = f"  {self._name} {done}/{total} {escape(self.text)}{rest}"
        # One line in a log file too, however narrow rich takes it to be.
        self._reporter.console.print(line, soft_wrap=True)
