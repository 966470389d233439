"""``strict_compat``: training gets the rows that DSPy's own class would give it, in its order.

Both run on the same programs, examples and LM, one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dspy
import pytest
import ray
from dspy.teleprompt import BootstrapFinetune

from examples.standin_teacher import serve_in_background
from tests import optimizer_programs as programs
from tests.optimizing import DSPY, TYPED, Oracle, compile_rows, make_lm, ours, texts
from tests.programs import Sentiment, TwoSteps

pytestmark = [pytest.mark.integration, pytest.mark.dspy]


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


TRAINSET = texts("sunny day 1", "grey day 2", "it was cold", "clear", "rainy day 5")


def with_demos(program, instructions=""):
    """The program with a demo in each predictor, and other instructions."""
    for name, predictor in program.named_predictors():
        values = {key: f"{key} of {name}" for key in predictor.signature.fields}
        predictor.demos = [dspy.Example(**{**values, "mood": "good"})]
        if instructions:
            predictor.signature = predictor.signature.with_instructions(f"{instructions} {name}.")
    return program


def with_lm(program, lm):
    program.set_lm(lm)
    return program


def likes_days(example, prediction, trace=None):
    return "day" in example.text


def how_good(example, prediction, trace=None):
    return 0.0 if "cold" in example.text else 0.4


@dataclass
class Case:
    """What both are given.

    ``options`` may be made from the two LMs of the student, ``teacher`` from the first.
    """

    student: Callable[[], dspy.Module]
    trainset: list = field(default_factory=lambda: TRAINSET)
    teacher: Callable[[Any], Any] = lambda lm: None
    options: Callable[..., dict] = lambda first, second: {}
    known: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    second_lm: bool = False


def optimized(lm):
    return with_lm(with_demos(TwoSteps(), "Be brief in"), lm)


def three_teachers(lm):
    return [optimized(lm), None, with_lm(TwoSteps(), lm.copy(temperature=0.7))]


def xml():
    return {"adapter": dspy.XMLAdapter()}


def by_lm(first, second):
    adapters = {first: dspy.ChatAdapter(), second: dspy.XMLAdapter()}
    return {"adapter": adapters, "train_kwargs": {first: {"seed": 1}, second: {"seed": 2}}}


CASES = {
    "one predictor": Case(lambda: dspy.Predict(Sentiment)),
    "chain of thought": Case(lambda: dspy.ChainOfThought("text -> reply")),
    "two predictors": Case(TwoSteps),
    "two LMs": Case(TwoSteps, second_lm=True),
    "two LMs with settings of their own": Case(TwoSteps, options=by_lm, second_lm=True),
    "demos": Case(lambda: with_demos(TwoSteps())),
    "demos left out": Case(
        lambda: with_demos(TwoSteps()), options=lambda *lms: {"exclude_demos": True}
    ),
    "a teacher with demos and instructions": Case(TwoSteps, teacher=optimized),
    "its demos left out": Case(
        TwoSteps, teacher=optimized, options=lambda *lms: {"exclude_demos": True}
    ),
    "a list of teachers": Case(lambda: with_demos(TwoSteps()), teacher=three_teachers),
    "a metric that says yes or no": Case(TwoSteps, options=lambda *lms: {"metric": likes_days}),
    "a metric that gives marks": Case(TwoSteps, options=lambda *lms: {"metric": how_good}),
    "equal examples": Case(
        TwoSteps,
        [*TRAINSET, *TRAINSET[1:4], TRAINSET[0]],
        options=lambda *lms: {"metric": how_good},
    ),
    "typed outputs": Case(programs.Typed, known=TYPED),
    "typed outputs in XML": Case(programs.Typed, known=TYPED, settings=xml()),
    "rows in XML, asked otherwise": Case(TwoSteps, options=lambda *lms: xml()),
    "modules in modules": Case(programs.Nested),
    "a loop": Case(programs.TenSteps),
    "branches": Case(programs.Branching, texts("sunny,grey", "cold", "foggy,rainy,cold")),
    "predictors tried again": Case(
        lambda: dspy.BestOfN(dspy.ChainOfThought(Sentiment), 2, lambda inputs, found: 0.0, 1.0)
    ),
    "an LM asked for two answers": Case(lambda: dspy.Predict(Sentiment, n=2)),
    "one LM for each predictor": Case(programs.Pipeline, options=lambda *lms: {"multitask": False}),
}

if DSPY < (3, 4):
    # Before 3.4, DSPy's own gives every predictor the rows of all the others.
    del CASES["one LM for each predictor"]


@pytest.mark.parametrize("name", CASES)
def test_the_rows_are_those_of_dspys_own_class(name, tmp_path):
    case = CASES[name]
    oracle = Oracle(**case.known)
    with serve_in_background(oracle) as server, dspy.context(**case.settings):
        lms = make_lm(server), make_lm(server, "another")
        stock = compiled(BootstrapFinetune, case, lms, num_threads=4)
        calls = oracle.calls
        strict = compiled(ours, case, lms, tmp_path, strict_compat=True)
    assert strict == stock
    assert all(job["train_data"] for job in stock.values())
    # Equal examples are asked once.
    assert oracle.calls - calls <= calls


def compiled(kind, case, lms, *arguments, **more):
    student = with_lm(case.student(), lms[0])
    if case.second_lm:
        student.predictors()[-1].lm = lms[1]
    optimizer = kind(*arguments, **case.options(*lms), **more)
    return compile_rows(optimizer, student, case.trainset, teacher=case.teacher(lms[0]))


VALUES = {
    "numbers": (dspy.Signature("a: float, b: bool -> reply"), {"a": 5, "b": 1}),
    "a model's fields as a dict": (
        dspy.Signature("a -> reply").append("person", dspy.InputField(), programs.Person),
        {"a": "x", "person": {"name": "Ann", "age": 3}},
    ),
    "collections where text is expected": (
        dspy.Signature("a, b, c -> reply"),
        {"a": ("x", 3), "b": [programs.Person(name="Ann", age=3)], "c": {"é": [1.5, None]}},
    ),
    "a conversation": (
        dspy.Signature("text, history: dspy.History -> reply"),
        {"text": "and you?", "history": dspy.History(messages=[{"text": "hi", "reply": "ho"}])},
    ),
    "an image": (
        dspy.Signature("text, image: dspy.Image -> reply"),
        {"text": "what is it?", "image": dspy.Image("https://pictures.example/cat.png")},
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_row_shows_values_as_the_teacher_was_shown_them(name, tmp_path):
    signature, values = VALUES[name]
    example = dspy.Example(**values).with_inputs(*values)
    case = Case(lambda: dspy.Predict(signature), [example])
    oracle = Oracle()
    with serve_in_background(oracle) as server:
        lms = make_lm(server), None
        stock = compiled(BootstrapFinetune, case, lms, num_threads=1)
        strict = compiled(ours, case, lms, tmp_path, strict_compat=True)
    assert strict == stock
    (job,) = strict.values()
    (shown,) = job["train_data"]
    assert [shown["messages"][:-1]] * 2 == oracle.prompts
