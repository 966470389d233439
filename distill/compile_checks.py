"""What a compile is given, checked: program, metric, examples, teachers.

Each function raises a ``ConfigurationError`` that names what was found and what to do, or does
nothing more. What is decided from it is ``compile_plan``.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_finetune import prepare_teacher

from distill import imports, open_teacher
from distill.config import SCRATCH, ScratchConfig, TraceConfig
from distill.config_file import validated
from distill.programs import check_inputs
from serve.dspy_lm import model_name
from serve.errors import ConfigurationError
from serve.programs import Setup, check_setup

MAX_FAILURE_RATE = 0.5
"""Of at least ``MIN_SAMPLE`` examples; what fails most of the time is not worth its price."""


@dataclass(frozen=True)
class Settings:
    """What ``RayBootstrapFinetune`` takes besides what DSPy's own class does."""

    student_model: str | None
    prompt: str
    scratch: ScratchConfig
    trace: TraceConfig
    num_threads: int | None
    storage: str
    name: str | None
    strict_compat: bool
    setup: Setup | None = None

    @classmethod
    def read(
        cls,
        *,
        scratch: Mapping[str, Any] | None,
        trace: Mapping[str, Any] | None,
        num_threads: int | None,
        **plain: Any,
    ) -> "Settings":
        """Check them.

        Raises:
            ConfigurationError: One is not what it should be.
        """
        setup = plain.get("setup")
        if setup is not None:
            check_setup(setup, getattr(setup, "__qualname__", type(setup).__qualname__))
        if plain["prompt"] not in ("folded", "full"):
            raise ConfigurationError(f"prompt={plain['prompt']!r}: expected 'folded' or 'full'.")
        tracing: TraceConfig = validated(
            TraceConfig, {"max_failure_rate": MAX_FAILURE_RATE, **(trace or {})}, "trace"
        )
        if num_threads is not None and num_threads < 1:
            raise ConfigurationError(f"num_threads={num_threads}: expected 1 or more.")
        sizes = validated(ScratchConfig, scratch or {}, "scratch")
        return cls(scratch=sizes, trace=tracing, num_threads=num_threads, **plain)


def check_program(student: Any) -> None:
    """A program has something to fine-tune."""
    check_module("student", student)
    if not student.predictors():
        raise ConfigurationError(f"{type(student).__name__} has no predictors to fine-tune.")


def check_module(name: str, program: Any) -> None:
    """A program is one; ``name`` is what the error calls it."""
    if not isinstance(program, dspy.Module):
        raise ConfigurationError(
            f"{name} is a {type(program).__name__}; expected a dspy.Module, that is an instance "
            "and not the class."
        )


def check_metric(metric: Any) -> None:
    """A metric takes an example, a prediction and a trace; None is fine."""
    if metric is None:
        return
    try:
        inspect.signature(metric).bind(None, None, None)
    except TypeError as error:
        raise ConfigurationError(
            f"metric: expected a function (example, prediction, trace=None): {error}."
        ) from None
    except ValueError:
        return  # A builtin does not say what it takes.


def check_examples(name: str, examples: Any, programs: Sequence[dspy.Module]) -> None:
    """Examples say what their inputs are, and every program takes these."""
    checked: set[tuple[str, ...]] = set()
    for number, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise ConfigurationError(
                f"{name}[{number}] is a {type(example).__name__}; expected a dspy.Example."
            )
        try:
            inputs = tuple(example.inputs().keys())
        except ValueError:
            raise ConfigurationError(
                f"{name}[{number}] does not say which of its fields are inputs. Call "
                ".with_inputs(...) on it."
            ) from None
        if inputs not in checked:
            checked.add(inputs)
            for program in programs:
                check_inputs(program, inputs, f"{name}[{number}].inputs()")


def check_imports(files: Sequence[str], student: dspy.Module, multitask: bool) -> None:
    """What was recorded elsewhere can become rows of the one student that there is."""
    imports.check(files)
    if files and not multitask and len(student.predictors()) > 1:
        raise ConfigurationError(
            "trace.import: a chat log does not say which predictor it is of, and multitask=False "
            "trains each on its own. Leave one of the two away."
        )


def structural(student: dspy.Module, teacher: dspy.Module | None) -> dspy.Module:
    """The teacher; the student where there is none."""
    if teacher is not None:
        check_module("teacher", teacher)
    try:
        return prepare_teacher(student, teacher)
    except AssertionError as error:
        raise ConfigurationError(f"teacher: does not fit the student: {error}.") from None


def find_teacher_lm(program: dspy.Module) -> Any:
    """The LM of a teacher's predictors that have none; it and theirs can teach."""
    without = [name for name, predictor in program.named_predictors() if predictor.lm is None]
    lm = dspy.settings.lm or (None if without else program.predictors()[0].lm)
    if lm is None:
        raise ConfigurationError(
            f"The teacher's predictors {', '.join(without)} have no LM to ask. Configure one with "
            "dspy.configure(lm=...), or give the teacher its own with teacher.set_lm(lm)."
        )
    open_teacher.check_elsewhere("The teacher's LM", lm)
    open_teacher.check_none_inside(program)
    for asked in (lm, *(predictor.lm for predictor in program.predictors())):
        if asked is not None and asked.model == model_name(SCRATCH):
            raise ConfigurationError(
                f"The teacher's LM is {asked.model}, which is not trained yet, so it has nothing "
                "to teach. Give compile a teacher= whose LM is, or leave the predictors' LMs to "
                'the teacher and name the student with student_model="scratch".'
            )
    return lm
