"""What the optimizer trains on, whoever the teacher is and wherever things are defined."""

import json
import os
import subprocess
import sys

import dspy
import pytest
import ray
from dspy.teleprompt import BootstrapFewShot

from tests.optimizing import Calls, make_lm, only, texts, trained
from tests.programs import Sentiment, TwoSteps
from tests.runs import ROOT, environment, mood_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.dspy,
    pytest.mark.usefixtures("local_ray"),
]

DAYS = texts("sunny day 1", "grey day 2", "it was cold")


def calls_over(program, examples):
    """The calls of a ``TwoSteps``."""
    calls = Calls(program)
    for text in (example.text for example in examples):
        inputs = {"text": text, "mood": mood_of(text)}
        calls.add("judge", {"text": text}, mood=inputs["mood"])
        calls.add("answer", inputs, reply=f"reply({text}, {inputs['mood']})")
    return calls


def test_the_teacher_may_come_from_dspys_settings(tmp_path, server):
    with dspy.context(lm=make_lm(server)):
        found = trained(tmp_path, TwoSteps(), DAYS, student_model="scratch")
    ((student, _),) = found
    assert student.model == "raydistill/scratch"
    assert only(found) == calls_over(TwoSteps(), DAYS).of()


def few_shot(program, lm):
    """The program with demos that DSPy has found for it."""
    program.set_lm(lm)
    optimizer = BootstrapFewShot(max_bootstrapped_demos=2, max_labeled_demos=0)
    program = optimizer.compile(program, trainset=texts("warm day 8", "foggy day 9"))
    program.set_lm(lm)
    return program


@pytest.mark.parametrize("strict", [False, True])
def test_a_prompt_optimised_teacher_is_asked_with_its_demos(tmp_path, oracle, lm, strict):
    teacher = few_shot(TwoSteps(), lm)
    for predictor in teacher.predictors():
        predictor.signature = predictor.signature.with_instructions("Think twice.")
    assert all(predictor.demos for predictor in teacher.predictors())
    before = len(oracle.prompts)
    found = trained(tmp_path, TwoSteps(), DAYS, lm=lm, teacher=teacher, strict_compat=strict)
    asked = oracle.prompts[before:]
    assert {prompt[0]["content"].rpartition(" ")[2] for prompt in asked} == {"twice."}
    assert {len(prompt) for prompt in asked} == {2 + 2 * 2}
    # A student is asked in its own words, unless all is to be as in DSPy.
    assert only(found) == calls_over(teacher if strict else TwoSteps(), DAYS).of()


@pytest.mark.parametrize("exclude_demos", [True, False])
def test_a_students_demos_are_in_its_rows_unless_left_out(tmp_path, lm, exclude_demos):
    student = few_shot(TwoSteps(), lm)
    found = trained(tmp_path, student, DAYS, exclude_demos=exclude_demos)
    kept = 0 if exclude_demos else 2
    assert {len(predictor.demos) for predictor in student.predictors()} == {kept}
    assert {len(json.loads(each)["messages"]) for each in only(found)} == {2 + 2 * kept + 1}


def test_each_of_several_teachers_gives_its_rows(tmp_path, oracle, lm, server):
    teachers = [dspy.Predict(Sentiment), None, dspy.Predict(Sentiment)]
    for teacher, name in ((teachers[0], "one"), (teachers[2], "two")):
        teacher.set_lm(make_lm(server, name))
    student = dspy.Predict(Sentiment)
    found = trained(tmp_path, student, [*DAYS, DAYS[0]], lm=lm, teacher=teachers)
    calls = Calls(student)
    for text in (example.text for example in 3 * [*DAYS, DAYS[0]]):
        calls.add("self", {"text": text}, mood=mood_of(text))
    assert only(found) == calls.of()
    assert oracle.calls == 3 * len(DAYS)


class Label:
    """A value that only Python knows."""


@pytest.mark.parametrize("label", [{"a", "b", "c", "d"}, Label(), {1: Label}])
def test_an_examples_labels_may_be_anything(tmp_path, lm, label):
    examples = [dspy.Example(text=e.text, label=label).with_inputs("text") for e in DAYS]
    found = trained(tmp_path, TwoSteps(), examples, lm=lm, metric=knows_its_label)
    assert only(found) == calls_over(TwoSteps(), DAYS).of()


def knows_its_label(example, prediction, trace=None):
    return isinstance(example.label, set | dict | Label)


SCRIPT = """
import sys
import dspy
from tests.optimizing import compile_rows, make_lm, ours, texts

class Mood(dspy.Signature):
    "Judge."
    text: str = dspy.InputField()
    mood: str = dspy.OutputField()

class Server:
    api_base = sys.argv[1]

class Program(dspy.Module):
    def __init__(self, shout):
        super().__init__()
        self.shout = shout
        self.judge = dspy.Predict(Mood)

    def forward(self, text):
        return self.judge(text=self.shout(text))

def metric(gold, pred, trace=None):
    with open(asked, "a") as file:
        file.write(gold.text + chr(10))
    return wanted in gold.text

if __name__ == "__main__":
    wanted, asked = "day", sys.argv[3]
    program = Program(lambda text: text + "!")
    program.set_lm(make_lm(Server))
    optimizer = ours(sys.argv[2], metric=lambda gold, pred, trace=None: metric(gold, pred))
    (job,) = compile_rows(optimizer, program, texts("sunny day", "cold")).values()
    (row,) = job["train_data"]
    print([message["content"] for message in row["messages"][1:]])
"""

# A notebook keeps the source of its cells where this process finds it, and no other.
NOTEBOOK = f"""
import linecache
cell = {SCRIPT!r}
linecache.cache["<cell>"] = (len(cell), None, cell.splitlines(True), "<cell>")
exec(compile(cell, "<cell>", "exec"))
"""


@pytest.mark.parametrize("script", [SCRIPT, NOTEBOOK], ids=["a script", "a notebook"])
def test_programs_metrics_and_lambdas_may_be_defined_in_main(tmp_path, server, script):
    path = tmp_path / "script.py"
    path.write_text(script)
    asked = tmp_path / "asked.txt"
    address = ray.get_runtime_context().gcs_address
    process = subprocess.run(
        [sys.executable, str(path), server.api_base, str(tmp_path / "runs"), str(asked)],
        cwd=tmp_path,
        env={
            **environment(),
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": address,
            # A Ray that was started by ray.init() asks for its token.
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "sunny day!" in process.stdout
    assert "[[ ## mood ## ]]\\ngood" in process.stdout
    # The metric may be a judge that has to be paid, so each example is scored once.
    assert sorted(asked.read_text().splitlines()) == ["cold", "sunny day"]
