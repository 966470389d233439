"""What the optimizer trains on, for each shape that programs take: every row, and no other.

The rows are ours in full, as a user gets them by default: what the student will be asked,
and what the teacher answered.
"""

import json

import dspy
import pytest

from examples.standin_teacher import serve_in_background
from tests import optimizer_programs as programs
from tests.optimizing import (
    TYPED,
    Calls,
    Oracle,
    compile_rows,
    make_lm,
    only,
    ours,
    texts,
    trained,
)
from tests.runs import mood_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.dspy,
    pytest.mark.usefixtures("local_ray"),
]

DAYS = texts("sunny day 1", "grey day 2", "it was cold")


def pipeline_calls(program, examples):
    calls = Calls(program)
    for text in (example.text for example in examples):
        inputs = {"text": text, "mood": mood_of(text)}
        said = f"({text}, {inputs['mood']})"
        calls.add("judge", {"text": text}, mood=inputs["mood"])
        calls.add("answer.predict", inputs, reasoning=f"reasoning{said}", reply=f"reply{said}")
    return calls


def test_one_lm_learns_all_predictors(tmp_path, lm):
    found = trained(tmp_path, programs.Pipeline(), DAYS, lm=lm)
    assert found == {(lm, None): pipeline_calls(programs.Pipeline(), DAYS).of()}


def test_without_multitask_each_predictor_is_learned_alone(tmp_path, lm):
    calls = pipeline_calls(programs.Pipeline(), DAYS)
    found = trained(tmp_path, programs.Pipeline(), DAYS, lm=lm, multitask=False)
    assert found == {(lm, 0): calls.of("judge"), (lm, 1): calls.of("answer.predict")}


@pytest.mark.parametrize("multitask", [True, False])
def test_predictors_may_have_lms_of_their_own(tmp_path, server, multitask):
    student = programs.Pipeline()
    lms = [make_lm(server, name) for name in ("small", "large")]
    for predictor, lm in zip(student.predictors(), lms, strict=True):
        predictor.lm = lm
    calls = pipeline_calls(student, DAYS)
    found = trained(tmp_path, student, DAYS, multitask=multitask)
    if multitask:
        assert found == dict.fromkeys([(lm, None) for lm in lms], calls.of())
    else:
        assert found == {
            (lms[0], 0): calls.of("judge"),
            (lms[1], 1): calls.of("answer.predict"),
        }


@pytest.mark.parametrize("multitask", [True, False])
def test_forty_predictors_called_in_any_order_get_their_own_rows(tmp_path, lm, multitask):
    examples = texts(*(f"text {number}" for number in range(12)))
    calls = Calls(programs.Many())
    for text in (example.text for example in examples):
        for index in programs.Many.order(text):
            calls.add(f"steps[{index}]", {"text": text}, **{f"out{index}": f"out{index}({text})"})
    assert len(calls.of()) == 12 * 30
    found = trained(tmp_path, programs.Many(), examples, lm=lm, multitask=multitask)
    if multitask:
        assert found == {(lm, None): calls.of()}
    else:
        assert found == {(lm, n): calls.of(f"steps[{n}]") for n in range(40)}


@pytest.mark.parametrize("multitask", [True, False])
def test_each_turn_of_a_loop_is_a_row(tmp_path, lm, multitask):
    calls = Calls(programs.TenSteps())
    for text in (example.text for example in DAYS):
        for number in range(10):
            inputs = {"number": str(number), "text": text}
            text = f"next({number}, {text})"
            calls.add("step", inputs, next=text)
        calls.add("polish", {"draft": text}, final=f"final({text})")
    assert len(calls.of("step")) == 10 * len(DAYS)
    found = trained(tmp_path, programs.TenSteps(), DAYS, lm=lm, multitask=multitask)
    if multitask:
        assert found == {(lm, None): calls.of()}
    else:
        assert found == {(lm, 0): calls.of("polish"), (lm, 1): calls.of("step")}


def test_a_branch_that_was_not_taken_gives_no_row(tmp_path, lm):
    examples = texts("sunny,grey", "cold", "foggy,rainy,cold")
    calls = Calls(programs.Branching())
    for text in (example.text for example in examples):
        for part in text.split(","):
            calls.add("judge", {"text": part}, mood=mood_of(part))
    calls.add("praise", {"text": "sunny,grey"}, compliment="compliment(sunny,grey)")
    for text in ("cold", "foggy,rainy,cold"):
        calls.add("deny", {"text": text}, denial=f"denial({text})")
    found = trained(tmp_path, programs.Branching(), examples, lm=lm, multitask=False)
    assert found == {(lm, n): calls.of(name) for n, name in enumerate(["deny", "praise", "judge"])}


def test_modules_are_found_in_lists_dicts_and_modules(tmp_path, lm):
    names = {
        "listed[0].think.predict": "first",
        "listed[1].think.predict": "second",
        "named['left'].think.predict": "third",
        "named['right']": "fourth",
        "deep.think.predict": "fifth",
        "deep.helper.think.predict": "sixth",
    }
    calls = Calls(programs.Nested())
    for name, output in names.items():
        thought = {} if output == "fourth" else {"reasoning": "reasoning(cold)"}
        calls.add(name, {"text": "cold"}, **thought, **{output: f"{output}(cold)"})
    student = programs.Nested()
    found = trained(tmp_path, student, texts("cold"), lm=lm, multitask=False)
    order = [name for name, _ in student.named_predictors()]
    assert found == {(lm, n): calls.of(name) for n, name in enumerate(order)}


def test_predictors_made_from_one_another_are_told_apart(tmp_path, lm):
    calls = Calls(programs.Twins())
    for text in (example.text for example in DAYS):
        calls.add("first", {"text": text}, better=f"better({text})")
        calls.add("second", {"text": f"better({text})"}, better=f"better(better({text}))")
    found = trained(tmp_path, programs.Twins(), DAYS, lm=lm, multitask=False)
    assert found == {(lm, 0): calls.of("first"), (lm, 1): calls.of("second")}


def test_answers_keep_their_types(tmp_path):
    oracle = Oracle(**TYPED)
    with serve_in_background(oracle) as server:
        calls = Calls(programs.Typed())
        for text in (example.text for example in DAYS):
            person = programs.Person(name=text, age=7, nicknames=["<b>"])
            told = {"tags": text.split(), "person": person}
            rest = {"count": len(text), "sure": True, "rest": {"half": 0.5}}
            calls.add("extract", {"text": text}, mood=mood_of(text), **told, **rest)
            said = json.dumps(person.model_dump()), json.dumps(text.split())
            calls.add("greet", told, greeting=f"greeting({', '.join(said)})")
        found = trained(tmp_path, programs.Typed(), DAYS, lm=make_lm(server), metric=is_typed)
    assert only(found) == calls.of()


def is_typed(example, prediction, trace=None):
    return prediction.person.age == prediction.count - len(example.text) + 7


def test_an_agents_turns_are_rows_those_after_a_failing_tool_too(tmp_path):
    def has_looked(inputs):
        # A trajectory is laid out as fields are.
        return "observation_0" in inputs

    oracle = Oracle(
        next_thought=lambda inputs: "done" if has_looked(inputs) else "look it up",
        next_tool_name=lambda inputs: "finish" if has_looked(inputs) else "lookup",
        next_tool_args=lambda inputs: (
            "{}" if has_looked(inputs) else json.dumps({"city": inputs["question"]})
        ),
    )
    examples = [dspy.Example(question=q).with_inputs("question") for q in ("Rome", "Atlantis")]
    with serve_in_background(oracle) as server:
        student, lm = programs.agent(), make_lm(server)
        jobs = compile_rows(*agents(tmp_path, student, lm), examples)
    rows = {key: [each["messages"] for each in job["train_data"]] for key, job in jobs.items()}
    assert [len(each) for each in rows.values()] == [4, 2]
    # What was learned from is what was asked, word for word.
    asked = [messages[:-1] for each in rows.values() for messages in each]
    assert sorted(map(json.dumps, asked)) == sorted(map(json.dumps, oracle.prompts))
    turns, ends = (
        ["\n".join(message["content"] for message in messages[1:]) for messages in each]
        for each in rows.values()
    )
    assert sum("Rome is sunny" in turn for turn in turns) == 1
    assert sum("no such city" in turn for turn in turns) == 1
    assert all("observation_1" in end for end in ends)


def agents(folder, student, lm):
    student.set_lm(lm)
    return ours(folder, multitask=False), student


@pytest.mark.parametrize("configured", [True, False], ids=["dspy.Retrieve", "a function"])
def test_what_a_retriever_found_is_in_the_rows(tmp_path, lm, configured):
    def find(question):
        return [passage.long_text for passage in programs.search(question, k=2)]

    questions = ("sun on Monday", "fog")
    examples = [dspy.Example(question=q).with_inputs("question") for q in questions]
    student = programs.Rag() if configured else programs.Rag(find)
    calls = Calls(programs.Rag())
    for question in questions:
        context = find(question)
        said = f"({json.dumps(context)}, {question})"
        outputs = {"reasoning": f"reasoning{said}", "answer": f"answer{said}"}
        calls.add("answer.predict", {"context": context, "question": question}, **outputs)
    with dspy.context(rm=programs.search if configured else None):
        found = trained(tmp_path, student, examples, lm=lm)
    assert only(found) == calls.of()


def test_a_program_may_only_have_aforward(tmp_path, lm):
    calls = pipeline_calls(programs.Pipeline(), DAYS)
    found = trained(tmp_path, programs.AsyncSteps(), DAYS, lm=lm)
    assert only(found) == calls.of()


def test_calls_made_side_by_side_are_all_rows(tmp_path, lm):
    # Many, since several examples are in flight, each of them side by side within.
    examples = texts(*(f"sunny {number},grey {number},cold {number}" for number in range(24)))
    calls = Calls(programs.Fanned())
    for text in (example.text for example in examples):
        moods = [mood_of(part) for part in text.split(",")]
        for part, mood in zip(text.split(","), moods, strict=True):
            calls.add("judge", {"text": part}, mood=mood)
        said = " ".join(moods)
        calls.add("answer", {"moods": said}, reply=f"reply({said})")
    found = trained(tmp_path, programs.Fanned(), examples, lm=lm, multitask=False)
    assert found == {(lm, 0): calls.of("judge"), (lm, 1): calls.of("answer")}
