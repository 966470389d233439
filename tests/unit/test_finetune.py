"""What names a student: whatever makes it another one, and nothing else."""

import pytest

from distill.config import ScratchConfig, StudentConfig, TrainConfig
from distill.export import Profile
from distill.finetune import FineTuning
from distill.rundir import RunDir


def identity(student=None, **train):
    job = FineTuning(
        train_rows="train.jsonl",
        val_rows="val.jsonl",
        rows_fingerprint="rows",
        student=student or StudentConfig(),
        train=TrainConfig(**train),
        profile=Profile(),
        directory=RunDir("."),
    )
    return job.identity()


def test_a_student_is_found_again_by_later_versions():
    # Another one would train again every student that there is.
    assert identity() == "353a4a73436bf4b00ce8a619"


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"packing": True}, {"seed": 1}])
def test_another_recipe_makes_another_student(change):
    assert identity(**change) != identity()


@pytest.mark.parametrize("change", [{"report_to": ["mlflow"]}, {"logging_steps": 3}])
def test_what_is_only_told_of_a_training_does_not(change):
    assert identity(**change) == identity()


def test_a_size_is_the_numbers_that_it_stands_for():
    named = ScratchConfig(size="mini")
    spelled = ScratchConfig(**named.model_dump(exclude={"size"}))
    assert spelled.size == "micro"
    assert identity(StudentConfig(scratch=named)) == identity(StudentConfig(scratch=spelled))
    assert identity(StudentConfig(scratch=named)) != identity()
