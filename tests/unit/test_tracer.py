"""The tracer: any program's calls are matched by name; whatever raises becomes data."""

import asyncio
import dataclasses
from typing import NamedTuple

import dspy
import pytest

from distill.programs import Task
from distill.tracing.trace import FailureKind
from distill.tracing.tracer import Tracer, with_current_score
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from tests import programs

pytestmark = pytest.mark.dspy


def answer(messages):
    prompt = read_prompt(messages)
    text = prompt.inputs["text"]
    if "garbled" in text:
        return "I would rather not say."
    if "refused" in text:
        raise TeacherRefuses(401, "bad key")
    mood = "bad" if "rain" in text else "good"
    known = {"mood": mood, "reply": f"re: {text}"}
    return prompt.reply({name: known[name] for name in prompt.outputs})


@pytest.fixture(scope="module")
def teacher():
    with serve_in_background(StandInTeacher(answer)) as server:
        yield server


@pytest.fixture
def run(teacher, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")

    def run(program, text, metric=None, mood="good", **settings):
        lm = dspy.LM("openai/stand-in", api_base=teacher.api_base, cache=False, num_retries=0)
        task = Task(program, dspy.ChatAdapter(), metric, settings)
        example = dspy.Example(text=text, mood=mood).with_inputs("text")

        async def once():
            return await Tracer(task, lm, concurrency=2).trace("key", example)

        return asyncio.run(once()), example, task

    return run


def names(trace):
    return [call.predictor for call in trace.calls]


def test_calls_are_matched_by_name_not_by_position(run):
    trace, _, _ = run(programs.TwoSteps(), "the sun")
    assert names(trace) == ["judge", "answer"]
    assert trace.calls[1].inputs == {"text": "the sun", "mood": "good"}
    assert trace.prediction == {"mood": "good", "reply": "re: the sun"}
    assert trace.usage.calls == 2
    assert trace.usage.prompt_tokens > 100


def test_a_copy_of_a_predictor_keeps_its_name_and_every_round_of_a_loop_is_kept(run):
    trace, _, _ = run(programs.Loop(), "sun,rain,sun")
    assert names(trace) == ["judge"] * 3
    assert trace.prediction["moods"] == ["good", "bad", "good"]


def test_an_async_program_is_awaited(run):
    trace, _, _ = run(programs.Async(), "rain")
    assert names(trace) == ["judge"]
    assert trace.prediction == {"mood": "bad"}


def test_a_retrieving_program_keeps_what_it_retrieved(run):
    trace, _, _ = run(programs.Retrieving(), "ab")
    assert trace.calls[0].inputs["passage"] == "the sun shines"


@pytest.mark.parametrize(
    ("program", "text", "kind", "said"),
    [
        (programs.Raising, "boom", FailureKind.PROGRAM, "cannot handle boom"),
        (programs.build, "garbled", FailureKind.PARSE, "I would rather not say."),
        (programs.build, "refused", FailureKind.PREVENTED, "bad key"),
    ],
)
def test_whatever_raises_becomes_a_failure_of_its_kind(run, program, text, kind, said):
    trace, _, _ = run(program(), text)
    assert trace.failure.kind is kind
    assert said in trace.failure.message
    assert trace.score is None


def test_a_program_may_return_anything_and_the_metric_gets_it_as_it_is(run):
    class Bare(dspy.Module):
        def __init__(self):
            super().__init__()
            self.judge = dspy.Predict(programs.Sentiment)

        def forward(self, text):
            return self.judge(text=text).mood

    def is_good(example, mood, trace=None):
        return mood == "good"

    trace, example, task = run(Bare(), "sun", is_good)
    assert trace.score.value == 1.0
    changed = dataclasses.replace(task, metric=lambda example, mood, trace=None: len(mood))
    assert with_current_score(trace, example, changed, dspy.LM("openai/judge")).score.value == 4.0


def test_the_metric_scores_and_what_it_raises_is_kept(run):
    assert run(programs.build(), "sun", programs.right_mood)[0].score.value == 1.0
    assert run(programs.build(), "rain", programs.right_mood)[0].score.value == 0.0
    broken = run(programs.build(), "sun", programs.broken_metric)[0]
    assert broken.score.value is None
    assert "label" in broken.score.error
    assert broken.failure is None


def test_a_changed_metric_scores_the_old_answers_anew_without_a_call(run):
    trace, example, task = run(programs.build(), "sun", programs.broken_metric)
    mended = dataclasses.replace(task, metric=programs.right_mood)
    lm = dspy.LM("openai/judge")
    assert with_current_score(trace, example, mended, lm).score.value == 1.0
    assert with_current_score(trace, example, task, lm) is trace
    unscored = dataclasses.replace(task, metric=None)
    assert with_current_score(trace, example, unscored, lm).score is None


def test_examples_in_flight_together_do_not_mix(teacher, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    lm = dspy.LM("openai/stand-in", api_base=teacher.api_base, cache=False)
    tracer = Tracer(Task(programs.TwoSteps(), dspy.ChatAdapter(), None), lm, concurrency=8)
    examples = [dspy.Example(text=f"sun {n}").with_inputs("text") for n in range(24)]

    async def all_of_them():
        return await asyncio.gather(*(tracer.trace(e.text, e) for e in examples))

    for trace in asyncio.run(all_of_them()):
        assert trace.prediction["reply"] == f"re: {trace.key}"
        assert [call.inputs["text"] for call in trace.calls] == [trace.key] * 2
        assert trace.usage.calls == 2


def test_calls_of_a_predictors_own_lm_are_counted(run, teacher):
    program = programs.TwoSteps()
    program.judge.lm = dspy.LM("openai/own", api_base=teacher.api_base, cache=False)
    trace, _, _ = run(program, "sun")
    assert trace.usage.calls == 2
    assert trace.usage.prompt_tokens > 100


class Choice(NamedTuple):
    """Holds an LM as programs may."""

    name: str
    lm: dspy.LM


def test_calls_of_lms_in_settings_and_of_held_ones_are_counted(run, teacher):
    class Choosing(dspy.Module):
        def __init__(self):
            super().__init__()
            self.judge = dspy.Predict(programs.Sentiment)
            self.choices = [(Choice("own", lm()), 1)]
            self.choices.append(self.choices)

        def forward(self, text):
            for choice in (self.choices[0][0].lm, dspy.settings.cheap, dspy.settings.many["a"][0]):
                with dspy.context(lm=choice):
                    found = self.judge(text=text)
            return found

    def lm():
        return dspy.LM("openai/own", api_base=teacher.api_base, cache=False)

    many = {"a": (lm(),)}
    many["self"] = many
    trace, _, _ = run(Choosing(), "sun", cheap=lm(), many=many)
    assert trace.failure is None
    assert trace.usages["judge"].calls == 3


def test_calls_in_a_programs_own_threads_are_counted_and_kept(run):
    class Threads(dspy.Module):
        def __init__(self):
            super().__init__()
            self.judge = dspy.Predict(programs.Sentiment)

        def forward(self, text):
            examples = [dspy.Example(text=part).with_inputs("text") for part in text.split(",")]
            parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
            moods = [p.mood for p in parallel([(self.judge, example) for example in examples])]
            return dspy.Prediction(mood=moods[0], moods=moods)

    trace, _, _ = run(Threads(), "sun,rain,sun")
    assert trace.failure is None
    assert trace.usage.calls == 3
    assert names(trace) == ["judge"] * 3


def test_the_metric_asks_the_judge_not_the_student(run, teacher):
    asked = []

    def metric(example, prediction, trace=None):
        asked.append(dspy.settings.lm.model)
        return True

    lm = dspy.LM("openai/student", api_base=teacher.api_base, cache=False)
    judge = dspy.LM("openai/judge", api_base=teacher.api_base, cache=False)
    tracer = Tracer(
        Task(programs.build(), dspy.ChatAdapter(), metric), lm, concurrency=1, judge=judge
    )
    example = dspy.Example(text="sun", mood="good").with_inputs("text")
    assert asyncio.run(tracer.trace("key", example)).score.value == 1.0
    assert asked == ["openai/judge"]
