"""Loads a task in an actor, as often as it is asked for; the setup hook runs once.

Each way of running a program needs one of its own, since it is changed for it. What the hook
put into the first is put into the others as well, so that all of them share its clients.
"""

import types
from collections.abc import Callable
from typing import Any

import cloudpickle
import dspy

from distill.programs import Task
from serve.programs import set_up

Path = tuple[tuple[str, Any], ...]
"""Leads from a program to a part of it, by attributes and keys."""
MAX_PARTS = 10_000
"""A list or dict of more than that is data, in which no hook hides a client."""
_PLAIN = (str, bytes, int, float, bool, type(None), type, types.ModuleType)


class TaskLoader:
    """Loads one task.

    Args:
        payload: The task, as ``Task.dumps`` wrote it.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._done: list[tuple[Path, Any]] = []

    async def first(self) -> Task:
        """The task, its program set up.

        Raises:
            ConfigurationError: The setup hook raised.
        """
        task: Task = cloudpickle.loads(self._payload)
        if task.setup is not None:
            before = _parts(task.program)
            await set_up(task.program, task.setup)
            self._done = _changes(before, task.program)
        return task

    def another(self) -> Task:
        """The task once more, to be changed apart from the first."""
        task: Task = cloudpickle.loads(self._payload)
        for path, value in self._done:
            _put(task.program, path, value)
        return task


def _parts(program: dspy.Module) -> dict[Path, Any]:
    """What a program holds, at whatever depth."""
    found: dict[Path, Any] = {}

    def enter(path: Path, part: Any) -> bool:
        found[path] = part
        return True

    _walk(program, enter)
    return found


def _changes(before: dict[Path, Any], program: dspy.Module) -> list[tuple[Path, Any]]:
    """What is new or another object than before; not what is within such a part."""
    found: list[tuple[Path, Any]] = []

    def enter(path: Path, part: Any) -> bool:
        same = path in before and before[path] is part
        found.extend([] if same else [(path, part)])
        return same

    _walk(program, enter)
    return found


def _walk(program: dspy.Module, enter: Callable[[Path, Any], bool]) -> None:
    """Meet every part of a program, and go on into those that ``enter`` says."""
    waiting: list[tuple[Path, Any]] = [((), program)]
    seen = {id(program)}
    for path, value in waiting:
        for step, part in _steps(value):
            within = (*path, step)
            if enter(within, part) and not isinstance(part, _PLAIN) and id(part) not in seen:
                seen.add(id(part))
                waiting.append((within, part))


def _steps(value: Any) -> list[tuple[tuple[str, Any], Any]]:
    steps = [(("attribute", name), part) for name, part in getattr(value, "__dict__", {}).items()]
    if isinstance(value, dict) and len(value) <= MAX_PARTS:
        steps += [(("key", key), part) for key, part in value.items()]
    if isinstance(value, list) and len(value) <= MAX_PARTS:
        steps += [(("key", number), part) for number, part in enumerate(value)]
    return steps


def _put(program: dspy.Module, path: Path, value: Any) -> None:
    *way, (kind, name) = path
    holder: Any = program
    for how, step in way:
        holder = vars(holder)[step] if how == "attribute" else holder[step]
    if kind == "attribute":
        vars(holder)[name] = _own(value)
    elif isinstance(holder, list) and name == len(holder):
        holder.append(_own(value))
    else:
        holder[name] = _own(value)


def _own(value: Any) -> Any:
    """Predictors are changed for the way in which they are run; a client is shared."""
    if isinstance(value, dspy.Module):
        return value.deepcopy()
    if isinstance(value, list) and any(isinstance(each, dspy.Module) for each in value):
        return [_own(each) for each in value]
    if isinstance(value, dict) and any(isinstance(each, dspy.Module) for each in value.values()):
        return {key: _own(each) for key, each in value.items()}
    return value
