"""The ways in which a program is run on an example besides the plain one.

A sample asks with a rollout of its own; a hinted run tells every predictor the label. Both are
settings that a run of the one program finds; running it is ``tracer``.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dspy

from distill.tracing.values import jsonable
from serve.dspy_lm import ROLLOUT
from serve.errors import TracingError


@dataclass(frozen=True)
class Variant:
    """Which run of an example it is.

    Attributes:
        sample: Its number; 0 is the plain one.
        hinted: Whether the label is told.
    """

    sample: int = 0
    hinted: bool = False

    def settings(self, example: dspy.Example, adapter: dspy.Adapter) -> dict[str, Any]:
        """What DSPy's settings are for this run of the example.

        Rows are rendered with the program's own instructions, so no hint reaches the student.
        """
        if not self.hinted:
            return {"adapter": adapter, ROLLOUT: self.sample}
        return {
            "adapter": _hinting(adapter, _hint(example)),
            ROLLOUT: self.sample,
            TELLING: _Telling(),
        }


@dataclass
class _Telling:
    """Whether anybody was told the hint."""

    told: bool = False


TELLING = "raydistill_telling"
"""Key in DSPy's settings, which follow a program into its threads."""


def check_told(settings: Mapping[str, Any]) -> None:
    """See that a run which predictors were called in has told one of them its hint, if any.

    Args:
        settings: Of the run, by ``Variant.settings``.

    Raises:
        TracingError: It has not.
    """
    telling = settings.get(TELLING)
    if telling is not None and not telling.told:
        raise TracingError(
            "The label was told to no predictor: the program sets an adapter of its own, and hints "
            "are told by the run's. Set it where the program is made, dspy.configure(adapter=...), "
            "and not where it runs, or set trace.hints: false."
        )


def _hint(example: dspy.Example) -> str:
    labels = json.dumps(jsonable(example.labels().toDict()), default=str, ensure_ascii=False)
    return (
        f"For this input, the task as a whole is known to end in {labels}. Let that guide your "
        "answer, and answer as you would have without being told: never mention it."
    )


class _Hinting:
    """Mixed into an adapter's own class; tells every predictor the hint."""

    hint: str

    def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        plain: Any = super()
        return plain.__call__(lm, lm_kwargs, self._told(signature), demos, inputs)

    async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        plain: Any = super()
        return await plain.acall(lm, lm_kwargs, self._told(signature), demos, inputs)

    def _told(self, signature: Any) -> Any:
        telling = dspy.settings.get(TELLING)
        if telling is not None:
            telling.told = True
        return signature.with_instructions(f"{signature.instructions}\n\n{self.hint}")


_classes: dict[type, Any] = {}


def _hinting(adapter: dspy.Adapter, hint: str) -> dspy.Adapter:
    kind = type(adapter)
    if kind not in _classes:
        _classes[kind] = type(f"Hinting{kind.__name__}", (_Hinting, kind), {})
    twin = copy.copy(adapter)
    twin.__class__ = _classes[kind]
    twin.hint = hint
    return twin
