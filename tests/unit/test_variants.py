"""The ways in which a program is run besides the plain one: samples and hints."""

import dspy
import pytest

from distill.programs import Task
from distill.tracing.variants import hinted_task, sampled, sampled_task
from tests import programs

pytestmark = pytest.mark.dspy


def lm(temperature=0.0):
    return dspy.LM("openai/x", temperature=temperature, cache=False)


class Asking(dspy.Module):
    """Asks an LM by itself, beside a predictor with an LM of its own."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)
        self.judge.lm, self.model = lm(), lm()


def task(program):
    return Task(program, dspy.ChatAdapter(), None)


def test_a_sample_asks_with_a_rollout_and_a_temperature_of_its_own():
    plain, warm = lm(), lm(temperature=0.3)
    assert sampled(plain, 0) is plain
    second = sampled(plain, 2)
    assert (second.kwargs["rollout_id"], second.kwargs["temperature"]) == (2, 1.0)
    assert sampled(warm, 1).kwargs["temperature"] == 0.3
    assert plain.kwargs["temperature"] == 0.0


def test_every_lm_that_a_program_holds_is_sampled():
    program = sampled_task(task(Asking()), 3).program
    assert program.judge.lm.kwargs["rollout_id"] == 3
    assert program.model.kwargs["rollout_id"] == 3


def test_a_hint_tells_every_predictor_the_label_and_nothing_of_the_inputs():
    example = dspy.Example(text="sun", mood="good").with_inputs("text")
    program = hinted_task(task(programs.TwoSteps()), example).program
    for predictor in program.predictors():
        assert '{"mood": "good"}' in predictor.signature.instructions
        assert "sun" not in predictor.signature.instructions
