"""What is run over examples: a program, an adapter and a metric, described and carried.

Importing and building the program is ``serve.programs``.
"""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import dspy

from distill import secrets, unpicklable
from distill.datasets import canonical_json
from distill.fingerprints import code_of, fingerprint, plain, state_of
from serve.dspy_lm import lm_identity
from serve.errors import ConfigurationError
from serve.programs import (
    Setup,
    build_program,
    describe_signature,
    entry_point,
    import_object,
    import_setup,
)

logger = logging.getLogger(__name__)

Metric = Callable[..., Any]

# The run decides these itself, or they belong to the process.
_NOT_CARRIED = {
    "adapter",
    "branch_idx",
    "caller_modules",
    "caller_predict",
    "callbacks",
    "disable_history",
    "lm",
    "max_history_size",
    "max_trace_size",
    "provide_traceback",
    "send_stream",
    "stream_listeners",
    "trace",
    "track_usage",
    "usage_tracker",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is run over examples: the program, the adapter that renders it, the metric.

    ``settings`` are those of DSPy's that the program may read, such as its retriever ``rm``.
    ``setup`` is called with the program once in each process that runs it; see
    ``serve.programs.set_up``.
    """

    program: dspy.Module
    adapter: dspy.Adapter
    metric: Metric | None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    setup: Setup | None = None
    metric_identity: str | None = dataclasses.field(init=False, default=None)
    """Names the metric as the driver knows it: a worker may have no source to look at."""

    def __post_init__(self) -> None:
        if self.metric is not None:
            object.__setattr__(self, "metric_identity", code_fingerprint(self.metric))

    def dumps(self) -> bytes:
        """The task as bytes, without API keys, for ``secrets.loads`` in another process.

        Raises:
            ConfigurationError: It holds something that cannot be carried; the message
                names the attribute.
        """
        try:
            return secrets.dumps(self)
        except Exception as error:
            raise ConfigurationError(
                f"{self._culprit()} cannot be sent to Ray's workers ({error}). Leave clients, "
                "connections, locks and open files out of the program and make them in a setup "
                "hook, a function (program) that is called once in each process: give setup."
            ) from error

    def _culprit(self) -> str:
        """What it is that cannot be carried."""
        parts = {
            "program": self.program,
            "setup": self.setup,
            "metric": self.metric,
            "adapter": self.adapter,
            "dspy.settings": SimpleNamespace(**self.settings),
        }
        found = (unpicklable.find(part, name) for name, part in parts.items())
        return next(filter(None, found), "program")


def import_path(program: dspy.Module) -> str | None:
    """The import path of a program's class, where calling that makes such a program."""
    kind = type(program)
    if kind.__module__ == "__main__" or _is_dspys(kind) or not kind.__qualname__.isidentifier():
        return None
    try:
        inspect.signature(kind).bind()
        fresh = kind()
    # A constructor is the user's code; one that wants more than nothing is no factory.
    except Exception as error:
        logger.info("%s() makes no program, so none is served: %s", kind.__qualname__, error)
        return None
    if _own_state(fresh) != _own_state(program):
        logger.info("%s() makes another program, so none is served.", kind.__qualname__)
        return None
    return f"{kind.__module__}:{kind.__qualname__}"


def hook_path(setup: Setup) -> str | None:
    """The import path of a setup hook, where it has one."""
    module, name = getattr(setup, "__module__", None), getattr(setup, "__qualname__", "<none>")
    path = f"{module}:{name}"
    if module in (None, "__main__") or "<" in name or import_object(path, "setup") is not setup:
        logger.info("setup=%s cannot be imported, so the program is not served.", name)
        return None
    return path


def carried_settings() -> dict[str, Any]:
    """What a program may read of DSPy's settings as they are here, for another process."""
    return {
        name: value
        for name, value in dspy.settings.copy().items()
        if name not in _NOT_CARRIED and value is not None
    }


def load_task(program_path: str, metric_path: str | None, setup_path: str | None = None) -> Task:
    """Import and build a program, and import its metric and its setup hook.

    Raises:
        ConfigurationError: One cannot be imported, or is not what it should be.
    """
    program = build_program(program_path)
    if not program.predictors():
        raise ConfigurationError(f"program: {program_path} has no predictors: nothing to distill.")
    metric = import_object(metric_path, "metric") if metric_path else None
    if metric is not None and not callable(metric):
        raise ConfigurationError(
            f"metric: {metric_path} is a {type(metric).__name__}; expected a function "
            "(example, prediction, trace=None)."
        )
    setup = import_setup(setup_path) if setup_path else None
    # A program may set its adapter when it is imported or built.
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    return Task(program, adapter, metric, carried_settings(), setup)


def check_inputs(program: dspy.Module, inputs: Sequence[str], setting: str = "data.inputs") -> None:
    """Check that ``program(**inputs)`` is a call that it accepts.

    Args:
        program: The program.
        inputs: Their names.
        setting: What the error calls them.

    Raises:
        ConfigurationError: The program lacks one of the inputs or requires another.
    """
    forward = entry_point(program)
    parameters = inspect.signature(forward)
    try:
        parameters.bind(**dict.fromkeys(inputs))
    except TypeError as error:
        raise ConfigurationError(
            f"{setting}={list(inputs)} does not fit the program's "
            f"{forward.__name__}{parameters}: {error}."
        ) from None
    # DSPy's own modules take whatever comes and hand it to their one predictor.
    if _is_dspys(type(program)) and len(program.predictors()) == 1:
        signature = program.predictors()[0].signature
        fields = signature.input_fields.items()
        missing = [name for name, info in fields if info.is_required() and name not in inputs]
        answers = [name for name in inputs if name in signature.output_fields]
        if missing or answers:
            raise ConfigurationError(
                f"{setting}={list(inputs)} does not fit the program's signature, whose inputs are "
                f"{list(signature.input_fields)}."
            )


def program_fingerprint(task: Task) -> str:
    """Changes when the program's answers may: its state, signatures, adapter, code or setup.

    The state is whatever its modules hold that has a JSON form, and their LMs. Comments,
    formatting and docstrings of methods count for nothing; what functions outside of its
    classes do is not looked at.
    """
    predictors = {
        name: {
            "signature": describe_signature(predictor.signature),
            "demos": [dict(demo) for demo in predictor.demos],
            "config": predictor.config,
            "lm": lm_identity(predictor.lm) if predictor.lm else None,
        }
        for name, predictor in task.program.named_predictors()
    }
    own = _own_modules(task.program)
    state = _own_state(task.program)
    kinds = {kind for module in own.values() for kind in type(module).__mro__}
    own_kinds = [kind for kind in kinds if not _is_dspys(kind) and kind is not object]
    code = sorted(canonical_json(code_of(kind)) for kind in own_kinds)
    adapter = [type(task.adapter).__qualname__, state_of(task.adapter)]
    settings = {name: [plain(value), state_of(value)] for name, value in task.settings.items()}
    # As the program's code, its hook decides what answers it gives: which index it asks.
    setup = [code_fingerprint(task.setup)] if task.setup else []
    return fingerprint([predictors, state, code, adapter, settings, *setup])


def _own_modules(program: dspy.Module) -> dict[str, dspy.Module]:
    """The modules that are not DSPy's own, by name."""
    modules = dict(program.named_sub_modules(dspy.Module))
    return {name: module for name, module in modules.items() if not _is_dspys(type(module))}


def _own_state(program: dspy.Module) -> dict[str, dict[str, Any]]:
    return {name: state_of(module) for name, module in _own_modules(program).items()}


def code_fingerprint(function: Callable[..., Any]) -> str:
    """Changes when a metric's or a hook's code does, or what it uses of where it was defined."""
    if not inspect.isfunction(function):
        return fingerprint(code_of(function))
    used = inspect.getclosurevars(function)
    around = {
        name: code_of(value) if inspect.isfunction(value) else plain(value)
        for name, value in {**used.globals, **used.nonlocals}.items()
    }
    return fingerprint([code_of(function), around])


def _is_dspys(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "dspy"
