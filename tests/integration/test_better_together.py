"""Compiles to the end inside DSPy's own machinery: BetterTogether, stock BootstrapFinetune."""

import json
from pathlib import Path

import dspy
import pytest
import ray
from dspy.teleprompt import BetterTogether, BootstrapFewShotWithRandomSearch, BootstrapFinetune

from distill import RayBootstrapFinetune, RayProvider
from distill.config import ScratchConfig
from distill.training.base_model import make_scratch
from examples.standin_teacher import serve_in_background
from serve import handles
from serve.dspy_lm import model_name, student_of
from tests.optimizing import DSPY, make_lm
from tests.programs import Sentiment, TwoSteps, right_mood
from tests.runs import BAD, GOOD, TINY, MoodTeacher, mood_of

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

RECIPE = {
    "num_workers": 1,
    "num_train_epochs": 30,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
}
SIZES = {**TINY, "hidden_size": 64}


def examples(numbers):
    words = (*GOOD, *BAD)
    texts = [f"day {number} was {words[number % len(words)]}" for number in numbers]
    return [dspy.Example(text=text, mood=mood_of(text)).with_inputs("text") for text in texts]


TRAINSET, VALSET = examples(range(16)), examples(range(100, 108))


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def teacher():
    with serve_in_background(MoodTeacher()) as server:
        yield make_lm(server)


def manifest(lm):
    """What a student's directory says of it."""
    return json.loads((Path(student_of(lm.model)) / "student.json").read_text())


def make_base(folder, program):
    """A tiny model of Hugging Face's kind that has learned nothing; returns its directory."""
    signatures = [predictor.signature for predictor in program.predictors()]
    prompts = [
        dspy.ChatAdapter().format(signature, [], dict.fromkeys(signature.input_fields, "day 1"))
        for signature in signatures
    ]
    conversations = [[*prompt, {"role": "assistant", "content": "good"}] for prompt in prompts]
    folder.mkdir()
    make_scratch(folder, conversations, ScratchConfig(**SIZES), max_length=4096, seed=0)
    return str(folder)


@pytest.fixture(scope="module")
def together(teacher, tmp_path_factory):
    """A program after a prompt optimizer and two fine-tunings, and what each step made."""
    program = dspy.Predict(Sentiment)
    program.set_lm(teacher)
    prompts = BootstrapFewShotWithRandomSearch(
        metric=right_mood,
        max_bootstrapped_demos=1,
        max_labeled_demos=1,
        num_candidate_programs=1,
        num_threads=4,
    )
    weights = RayBootstrapFinetune(
        metric=right_mood,
        # Both of the CPUs: no student may still hold one of them.
        train_kwargs={**RECIPE, "num_workers": 2},
        student_model="scratch",
        scratch=SIZES,
        storage=str(tmp_path_factory.mktemp("together")),
    )
    # DSPy's prompt optimizers forget the predictors' own LMs while they work.
    with dspy.context(lm=teacher, experimental=True):
        if DSPY < (3, 2):
            optimizer = BetterTogether(right_mood, prompts, weights, seed=0)
            best = optimizer.compile(program, TRAINSET, strategy="p -> w -> w", valset_ratio=0.5)
            return best, dict(best.candidate_programs)
        optimizer = BetterTogether(metric=right_mood, p=prompts, w=weights)
        best = optimizer.compile(
            program, trainset=TRAINSET, valset=VALSET, strategy="p -> w -> w", seed=0
        )
    assert not best.flag_compilation_error_occurred
    return best, {made["strategy"]: made["program"] for made in best.candidate_programs}


def test_better_together_takes_every_step(together):
    best, made = together
    assert set(made) == {"", "p", "p -> w", "p -> w -> w"}
    assert best(text=VALSET[0].text).mood in ("good", "bad")


def test_each_fine_tuning_makes_a_student_of_its_own(together):
    _, made = together
    first, second = made["p -> w"].lm.model, made["p -> w -> w"].lm.model
    assert made["p"].lm.model == "openai/teacher"
    assert first != second
    for name in (first, second):
        assert Path(student_of(name), "model.safetensors").exists()


def test_a_student_of_each_step_answers_after_all(together):
    _, made = together
    for strategy in ("p -> w", "p -> w -> w"):
        assert made[strategy](text=VALSET[1].text).mood in ("good", "bad")


def test_nothing_stays_launched(together):
    _, made = together
    for strategy in ("p -> w", "p -> w -> w"):
        assert handles.handle(student_of(made[strategy].lm.model)) is None


def test_dspys_own_bootstrap_finetune_trains_on_ray(teacher, tmp_path):
    base = make_base(tmp_path / "base", dspy.Predict(Sentiment))
    student, asked = dspy.Predict(Sentiment), dspy.Predict(Sentiment)
    asked.set_lm(teacher)
    provider = RayProvider(storage=str(tmp_path / "runs"))
    student.set_lm(dspy.LM(model_name(base), provider=provider, cache=False))
    optimizer = BootstrapFinetune(metric=right_mood, train_kwargs=RECIPE, num_threads=4)
    finetuned = optimizer.compile(student, trainset=TRAINSET, teacher=asked)
    assert student_of(finetuned.lm.model).startswith(str(tmp_path / "runs/finetuned/students"))
    assert finetuned(text=TRAINSET[0].text).mood in ("good", "bad")


def test_a_student_for_each_predictor_starts_from_a_hugging_face_directory(teacher, tmp_path):
    program = TwoSteps()
    base = make_base(tmp_path / "base", program)
    optimizer = RayBootstrapFinetune(
        metric=right_mood,
        multitask=False,
        train_kwargs=RECIPE,
        student_model=base,
        storage=str(tmp_path / "runs"),
    )
    with dspy.context(lm=teacher):
        finetuned = optimizer.compile(program, trainset=TRAINSET)
    students = {name: manifest(p.lm) for name, p in finetuned.named_predictors()}
    assert {name: list(found["predictors"]) for name, found in students.items()} == {
        name: [name] for name in students
    }
    assert len({predictor.lm.model for predictor in finetuned.predictors()}) == 2
    assert {found["base_model"] for found in students.values()} == {base}
    prediction = finetuned(text=TRAINSET[0].text)
    assert prediction.mood in ("good", "bad")
    assert prediction.reply.startswith("It is")
