"""How the tests call an optimizer: up to the rows, with an LM behind a real socket.

Training is left out at DSPy's own seam, ``finetune_lms``, by DSPy's own class and by ours.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import dspy

from distill import RayBootstrapFinetune
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, message_text
from tests.runs import mood_of

os.environ.setdefault("OPENAI_API_KEY", "none")

DSPY = tuple(int(part) for part in dspy.__version__.split(".")[:2])
ONE_ACTOR = {"actors": 1}

Inputs = Mapping[str, str]

_XML_FIELD = re.compile(r"^<(\w+)>\n(.*?)\n</\1>", re.MULTILINE | re.DOTALL)
_XML_ASKED = re.compile(r"`<(\w+)>`")


class Oracle(StandInTeacher):
    """Answers every field that it is asked for, in the layout of the prompt.

    An answer says which field it is, and from which inputs: ``reply(sunny day)``.

    Args:
        known: What fields of some names are answered with instead, given the inputs.
    """

    def __init__(self, **known: Callable[[Inputs], str]) -> None:
        super().__init__(self._reply)
        self.asked: list[Inputs] = []
        """The inputs of each prompt so far."""
        self.prompts: list[list[dict]] = []
        """The messages of each prompt so far."""
        self._known = {"mood": lambda inputs: mood_of(inputs["text"]), **known}

    def _reply(self, messages: list[dict]) -> str:
        text = message_text(messages[-1])
        self.prompts.append(messages)
        if _XML_ASKED.search(text):
            inputs, names = dict(_XML_FIELD.findall(text)), _XML_ASKED.findall(text)
            self.asked.append(inputs)
            return "\n".join(f"<{name}>\n{self.answer(name, inputs)}\n</{name}>" for name in names)
        prompt = read_prompt(messages)
        self.asked.append(prompt.inputs)
        return prompt.reply({name: self.answer(name, prompt.inputs) for name in prompt.outputs})

    def answer(self, name: str, inputs: Inputs) -> str:
        """What a field is answered with."""
        if name in self._known:
            return self._known[name](inputs)
        return f"{name}({', '.join(inputs.values())})"


TYPED: dict[str, Callable[[Inputs], str]] = {
    "tags": lambda inputs: json.dumps(inputs["text"].split()),
    "person": lambda inputs: json.dumps({"name": inputs["text"], "age": 7, "nicknames": ["<b>"]}),
    "count": lambda inputs: str(len(inputs["text"])),
    "sure": lambda inputs: "True",
    "rest": lambda inputs: '{"half": 0.5}',
}
"""Answers to ``optimizer_programs.Typed``."""


def make_lm(server: Any, model: str = "teacher", **settings: Any) -> dspy.LM:
    """An LM that asks a stand-in's server, each time anew."""
    return dspy.LM(
        f"openai/{model}", api_base=server.api_base, cache=False, num_retries=0, **settings
    )


def texts(*values: str, **more: Any) -> list[dspy.Example]:
    """Examples whose one input is a text."""
    return [dspy.Example(text=value, **more).with_inputs("text") for value in values]


def compile_rows(
    optimizer: Any, student: dspy.Module, trainset: list[dspy.Example], **arguments: Any
) -> dict[Any, dict[str, Any]]:
    """Compile with all but the training, and return what training was given, by key."""
    jobs: dict[Any, dict[str, Any]] = {}

    def finetune_lms(given):
        jobs.update(given)
        return {key: key[0] for key in given}

    optimizer.finetune_lms = finetune_lms
    optimizer.compile(student, trainset=trainset, **arguments)
    return jobs


def ours(folder: Any, **options: Any) -> RayBootstrapFinetune:
    """The optimizer, with one actor and all that it leaves behind in a folder."""
    return RayBootstrapFinetune(**{"storage": str(folder), "trace": ONE_ACTOR, **options})


def row(predictor: dspy.Predict, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The row of one call of a predictor, as DSPy writes it."""
    found: dict[str, Any] = dspy.ChatAdapter().format_finetune_data(
        predictor.signature, predictor.demos, dict(inputs), dict(outputs)
    )
    return found


def in_order(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in an order that does not depend on how they were shuffled, as text."""
    return sorted(json.dumps(row) for row in rows)


def trained(
    folder: Any,
    student: dspy.Module,
    examples: list[dspy.Example],
    *,
    lm: Any = None,
    teacher: Any = None,
    **options: Any,
) -> dict[Any, list[str]]:
    """The rows of each fine-tuning that ours starts, by its key, in ``in_order``."""
    if lm:
        student.set_lm(lm)
    jobs = compile_rows(ours(folder, **options), student, examples, teacher=teacher)
    return {key: in_order(job["train_data"]) for key, job in jobs.items()}


def only(jobs: Mapping[Any, Any]) -> Any:
    """What the one key of the jobs has."""
    (job,) = jobs.values()
    return job


class Calls:
    """The rows that calls of a program's predictors should become, written down one by one."""

    def __init__(self, program: dspy.Module) -> None:
        self._predictors = dict(program.named_predictors())
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self._predictors}

    def add(self, name: str, inputs: Inputs, **outputs: Any) -> None:
        """A predictor was called, and answered."""
        self._rows[name].append(row(self._predictors[name], inputs, outputs))

    def of(self, *names: str) -> list[str]:
        """The rows of these predictors, or of all, in ``in_order``."""
        return in_order([row for name in names or self._rows for row in self._rows[name]])


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions this thread calls meanwhile."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
