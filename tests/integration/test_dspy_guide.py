"""The examples of the DSPy drop-in, each run as its user would: a process, from a folder."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.dspy_guide.data import legs, passages, returns, reviews
from examples.dspy_guide.rag import WordOverlap
from examples.dspy_guide.teacher import API_KEY
from tests.runs import ROOT, environment

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

KEY_IN_ENVIRONMENT = "a-key-from-the-environment"

LOAD_WHOLE = """
import sys
import distill
import dspy

program = dspy.load("runs/finetuned_qa_program", allow_pickle=True)
print(program(question=sys.argv[1]).answer)
"""


@dataclass(frozen=True)
class Ran:
    """What an example printed, and the folder that it ran in."""

    folder: Path
    output: str

    def number(self, pattern: str) -> float:
        """The number that the output holds where the pattern has its group."""
        found = re.search(pattern, self.output)
        assert found, self.output
        return float(found[1])


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **environment(),
            "OPENAI_API_KEY": KEY_IN_ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "DSPY_CACHEDIR": str(folder / "cache"),
            # litellm would wait for its list of prices from the network.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Ran(folder, done.stdout)


def run_example(folder, name, *arguments):
    return run(folder, "-m", f"examples.dspy_guide.{name}", *arguments)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    return run_example(tmp_path_factory.mktemp("qa"), "question_answering")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return run_example(tmp_path_factory.mktemp("sentiment"), "sentiment")


@pytest.fixture(scope="module", params=["own retriever", "dspy.Retrieve"])
def looked_up(request, tmp_path_factory):
    arguments = ["--dspy-retrieve"] if request.param == "dspy.Retrieve" else []
    return run_example(tmp_path_factory.mktemp("rag"), "rag", *arguments)


@pytest.mark.parametrize("make", [legs, reviews, returns])
def test_no_example_is_in_both_splits(make):
    trainset, devset = make()
    asked = [next(iter(example.inputs().values())) for example in [*trainset, *devset]]
    assert len(set(asked)) == len(asked)
    assert len(devset) >= 60


def test_the_retriever_finds_the_rule_of_the_thing_that_is_asked_about():
    retrieve = WordOverlap(passages())
    for example in returns()[1]:
        [found] = retrieve(example.question)
        assert found.partition(":")[0] in example.question


def test_the_student_answers_questions_that_it_has_not_seen(answered):
    assert answered.number(r"Held-out questions: (\d+) of 60 right") >= 45


def test_a_new_process_loads_the_program_and_answers(answered):
    lines = run_example(answered.folder, "question_answering", "--load").output.splitlines()
    answers = {example.question: example.answer for example in legs()[1]}
    asked, thought, said = lines[::3], lines[1::3], lines[2::3]
    assert len(asked) == 3
    assert all("legs" in line for line in thought)
    assert sum(answers[q] == a.strip() for q, a in zip(asked, said, strict=True)) >= 2


def test_a_new_process_loads_the_program_with_its_code_and_answers(answered):
    example = legs()[1][0]
    assert run(answered.folder, "-c", LOAD_WHOLE, example.question).output.strip().isdigit()


def test_the_saved_program_names_its_student(answered):
    saved = json.loads((answered.folder / "runs/finetuned_qa_model.json").read_text())
    model = saved["cot.predict"]["lm"]["model"]
    assert model.startswith(f"raydistill/{answered.folder}")
    assert (Path(model.removeprefix("raydistill/")) / "model.safetensors").exists()


def test_running_it_again_trains_nothing_anew(answered):
    students = answered.folder / "runs/TeacherQA/students"
    before = sorted(path.name for path in students.iterdir())
    again = run_example(answered.folder, "question_answering")
    assert again.number(r"(\d+) of 60 right") == answered.number(r"(\d+) of 60 right")
    assert sorted(path.name for path in students.iterdir()) == before
    events = (answered.folder / "runs/TeacherQA/events.jsonl").read_text()
    assert events.count('"train_start"') == 1


def test_the_sentiment_student_comes_near_its_teacher(judged):
    assert judged.number(r"Before, the teacher: ([\d.]+) %") == 96
    assert judged.number(r"After, the student: ([\d.]+) %") >= 88
    assert re.search(r"-> (positive|negative|mixed)$", judged.output, re.MULTILINE)


def test_the_rag_student_reads_rules_that_it_has_not_seen(looked_up):
    assert looked_up.number(r"Before, the teacher: ([\d.]+) %") == 96.7
    assert looked_up.number(r"After, the student: ([\d.]+) %") >= 80
    assert re.search(r"-> (free|paid|final)$", looked_up.output, re.MULTILINE)


@pytest.mark.parametrize("example", ["answered", "judged"])
def test_no_api_key_is_left_behind(example, request):
    assert_no_key_below(request.getfixturevalue(example).folder)


def test_no_api_key_is_left_behind_by_a_program_with_a_retriever(looked_up):
    assert_no_key_below(looked_up.folder)


def assert_no_key_below(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        content = path.read_bytes()
        assert API_KEY.encode() not in content, path
        assert KEY_IN_ENVIRONMENT.encode() not in content, path
