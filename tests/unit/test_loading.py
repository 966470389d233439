"""A task is loaded several times in an actor, and set up once."""

import asyncio
import threading

import dspy
import pytest

from distill.programs import Task
from distill.tracing.loading import TaskLoader
from distill.tracing.variants import hinted_task
from tests import programs

pytestmark = pytest.mark.dspy


class Tool:
    client = None


class Deep(programs.TwoSteps):
    def __init__(self):
        super().__init__()
        self.tools = [Tool(), Tool()]
        self.by_name = {"one": Tool()}
        self.corpus = ["a passage"] * 20_000
        self.inner = programs.TwoSteps()


def loader(setup):
    return TaskLoader(Task(Deep(), dspy.ChatAdapter(), None, setup=setup).dumps())


def programs_of(setup):
    """The program as it is loaded first, and as it is loaded again."""
    loading = loader(setup)
    return asyncio.run(loading.first()).program, loading.another().program


def test_without_a_hook_each_program_is_as_it_was_sent():
    first, second = programs_of(None)
    assert first is not second
    assert vars(first).keys() == vars(second).keys()


def test_what_the_hook_makes_is_shared_at_whatever_depth_it_is_put():
    def setup(program):
        program.client = program.tools[1].client = threading.Lock()
        program.by_name["one"].client = program.by_name["two"] = object()
        program.tools.append(object())
        program.inner.client = program.inner.judge.config["client"] = object()

    first, second = programs_of(setup)
    assert first is not second
    assert first.client is second.client is second.tools[1].client
    assert first.tools[0].client is second.tools[0].client is None
    assert first.by_name["two"] is second.by_name["two"] is second.by_name["one"].client
    assert first.tools[2] is second.tools[2]
    assert first.inner.client is second.inner.client is second.inner.judge.config["client"]
    assert first.tools is not second.tools


def test_predictors_that_the_hook_makes_are_each_programs_own():
    def setup(program):
        program.rank = dspy.Predict("passages -> best")
        program.steps = [dspy.Predict("a -> b")]
        program.ways = {"left": dspy.Predict("c -> d")}

    loading = loader(setup)
    first = asyncio.run(loading.first())
    example = dspy.Example(text="sun", mood="good").with_inputs("text")
    hinted = hinted_task(loading.another(), example)
    assert len(hinted.program.predictors()) == len(first.program.predictors()) == 7
    assert all("good" in each.signature.instructions for each in hinted.program.predictors())
    assert not any("good" in each.signature.instructions for each in first.program.predictors())
