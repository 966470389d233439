"""The user's program: importing it, building it, describing it, how it wants to be called.

A program is named by an import path, ``package.module:factory``; it is looked for in the
working directory first, as ``python -m`` would.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pydantic

from serve.errors import ConfigurationError

if TYPE_CHECKING:
    import dspy

Setup = Callable[["dspy.Module"], Any]
"""Gives a program what cannot be carried to another process; see ``set_up``."""

RETURNED = "returned"
"""The output of a program that does not return a ``dspy.Prediction``."""


def import_object(path: str, role: str) -> Any:
    """Import ``package.module:name``; the name may have dots.

    Raises:
        ConfigurationError: The module does not import, or has no such name.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        thing: Any = importlib.import_module(module_name)
    # A user's module may raise anything when it is imported.
    except Exception as error:
        raise ConfigurationError(
            f"{role}: cannot import {module_name}: {type(error).__name__}: {error}"
            f"{_place(error)}. Import paths are looked for from the working directory."
        ) from error
    try:
        for part in name.split("."):
            thing = getattr(thing, part)
    except AttributeError:
        known = [key for key, value in vars(thing).items() if inspect.isfunction(value)]
        raise ConfigurationError(
            f"{role}: {module_name} has no {name!r}; its functions are {', '.join(known)}."
        ) from None
    return thing


def build_program(path: str) -> "dspy.Module":
    """Import and call a program's factory.

    Raises:
        ConfigurationError: It does not import, raises, or gives no ``dspy.Module``.
    """
    import dspy

    factory = import_object(path, "program")
    try:
        program = factory() if callable(factory) else factory
    # The factory is the user's code as well.
    except Exception as error:
        raise ConfigurationError(
            f"program: {path}() raised {type(error).__name__}: {error}{_place(error)}."
        ) from error
    if not isinstance(program, dspy.Module):
        raise ConfigurationError(
            f"program: {path} gave a {type(program).__name__}; expected a function that "
            "returns a dspy.Module."
        )
    return program


def import_setup(path: str) -> Setup:
    """Import a setup hook.

    Raises:
        ConfigurationError: It does not import, or is no function of a program.
    """
    hook = import_object(path, "setup")
    check_setup(hook, path)
    return hook


def check_setup(hook: Any, name: str) -> None:
    """See that a setup hook can be called with a program; ``name`` is what the error calls it.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        inspect.signature(hook).bind(None)
    except TypeError as error:
        raise ConfigurationError(
            f"setup: {name} cannot be called with the program ({error}). Expected a function "
            "(program), which may be async."
        ) from None
    except ValueError:
        return  # A builtin does not say what it takes.


async def set_up(program: "dspy.Module", hook: Setup) -> None:
    """Call a setup hook with the program, before the program is first run in this process.

    The hook changes the program in place; what it returns is awaited if it can be, and not
    looked at.

    Raises:
        ConfigurationError: The hook raised.
    """
    try:
        returned = hook(program)
        if inspect.isawaitable(returned):
            await returned
    # The hook is the user's code.
    except Exception as error:
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        raise ConfigurationError(
            f"setup: {name}(program) raised {type(error).__name__}: {error}{_place(error)}. It is "
            "called in each process that runs the program, with that node's files and environment."
        ) from error


def as_prediction(returned: Any) -> "dspy.Prediction":
    """What a program returned, as a prediction: programs may return anything."""
    import dspy

    if isinstance(returned, dspy.Prediction):
        return returned
    return dspy.Prediction(**{RETURNED: returned})


def runs_async(program: "dspy.Module") -> bool:
    """Whether the program itself, not only DSPy beneath it, defines ``aforward``."""
    # DSPy's own modules have both; a thread costs them less than an event loop does.
    owner = next((kind for kind in type(program).__mro__ if "aforward" in vars(kind)), None)
    return owner is not None and not owner.__module__.startswith("dspy.")


def entry_point(program: "dspy.Module") -> Callable[..., Any]:
    """The method that a call of the program ends up in."""
    name = "aforward" if runs_async(program) else "forward"
    # Past DSPy's own attribute access, which warns of forward being used directly.
    method: Callable[..., Any] = object.__getattribute__(program, name)
    return method


def describe_signature(signature: "type[dspy.Signature]") -> dict[str, Any]:
    """A signature as JSON values: instructions and typed fields."""

    def describe(field: Any) -> dict[str, Any]:
        return {
            "type": _describe_type(field.annotation),
            "description": (field.json_schema_extra or {}).get("desc"),
        }

    return {
        "instructions": signature.instructions,
        "inputs": {name: describe(field) for name, field in signature.input_fields.items()},
        "outputs": {name: describe(field) for name, field in signature.output_fields.items()},
    }


def _describe_type(annotation: Any) -> Any:
    try:
        return pydantic.TypeAdapter(annotation).json_schema()
    except (pydantic.errors.PydanticUserError, TypeError):
        # Types without a schema, as classes of the user's own, are known by their name.
        return getattr(annotation, "__qualname__", str(annotation))


def _place(error: BaseException) -> str:
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    if frame is None or frame.tb_frame.f_code.co_filename.startswith("<frozen"):
        return ""
    return f" ({frame.tb_frame.f_code.co_filename}, line {frame.tb_lineno})"
