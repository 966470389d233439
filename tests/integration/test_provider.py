"""The provider: DSPy's contract for fine-tuning, launching and killing, on a real Ray."""

import time
from concurrent.futures import CancelledError

import dspy
import pytest
import ray
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from distill import RayProvider
from distill.config import ScratchConfig
from distill.training.base_model import make_scratch
from serve.errors import ConfigurationError, TrainingError
from tests.runs import TINY

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"day {number} was {word}"},
            {"role": "assistant", "content": mood},
        ]
    }
    for number in range(12)
    for word, mood in (("sunny", "good"), ("rainy", "bad"))
]
RECIPE = {"num_train_epochs": 30, "learning_rate": 1e-2, "num_workers": 1, "logging_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face model that has learned nothing yet."""
    folder = tmp_path_factory.mktemp("base")
    conversations = [row["messages"] for row in ROWS]
    make_scratch(folder, conversations, ScratchConfig(**TINY), max_length=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def lm(base, tmp_path_factory):
    provider = RayProvider(storage=str(tmp_path_factory.mktemp("runs")))
    return dspy.LM(f"raydistill/{base}", provider=provider, cache=False)


@pytest.fixture(scope="module")
def student(lm):
    job = lm.finetune(ROWS, TrainDataFormat.CHAT, RECIPE)
    assert job.status() in (TrainingStatus.pending, TrainingStatus.running)
    student = job.result(timeout=300)
    assert job.status() is TrainingStatus.succeeded
    return student


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


def wait_until(fact) -> None:
    deadline = time.monotonic() + 120
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_finetuned_lm_has_learned_its_rows(student):
    assert student("day 3 was sunny")[0].strip() == "good"
    assert student("day 3 was rainy")[0].strip() == "bad"


def test_the_same_job_again_trains_nothing(lm, student):
    again = lm.finetune(ROWS, TrainDataFormat.CHAT, RECIPE).result(timeout=60)
    assert again.model == student.model


def test_output_dir_is_where_the_student_goes(lm, tmp_path):
    recipe = {**RECIPE, "num_train_epochs": 1, "output_dir": str(tmp_path / "mine")}
    job = lm.finetune(ROWS, TrainDataFormat.CHAT, recipe)
    assert job.result(timeout=300).model.startswith(f"raydistill/{tmp_path / 'mine'}/")


def test_a_failed_job_raises_its_cause(lm):
    broken = [{"messages": [{"role": "user", "content": "no answer"}]}]
    job = lm.finetune(broken, TrainDataFormat.CHAT, RECIPE)
    with pytest.raises(ConfigurationError, match=r"train_data\[0\]"):
        job.result(timeout=60)
    assert job.status() is TrainingStatus.failed
    with pytest.raises(TrainingError, match="nothing to train on"):
        lm.finetune([], TrainDataFormat.CHAT, RECIPE).result(timeout=60)
    with pytest.raises(ConfigurationError, match="learning_rate"):
        lm.finetune(ROWS, TrainDataFormat.CHAT, {"learning_rat": 1}).result(timeout=60)


def test_a_running_job_can_be_cancelled_and_frees_the_cluster(lm):
    before = free_cpus()
    job = lm.finetune(ROWS, TrainDataFormat.CHAT, {**RECIPE, "num_train_epochs": 5000})
    wait_until(lambda: job.status() is TrainingStatus.running and free_cpus() < before)
    waiting = lm.finetune(ROWS, TrainDataFormat.CHAT, {**RECIPE, "num_train_epochs": 5001})
    assert waiting.status() is TrainingStatus.pending
    assert waiting.cancel()
    assert job.cancel()
    for cancelled in (job, waiting):
        assert cancelled.status() is TrainingStatus.cancelled
        with pytest.raises(CancelledError):
            cancelled.result()
        cancelled.thread.join(120)
        assert not cancelled.thread.is_alive()
    wait_until(lambda: free_cpus() == before)


def test_a_job_that_has_ended_cannot_be_cancelled(lm, student):
    job = lm.finetune(ROWS, TrainDataFormat.CHAT, RECIPE)
    job.result(timeout=60)
    assert not job.cancel()
    assert job.status() is TrainingStatus.succeeded


def test_launch_and_kill_may_be_repeated_and_leave_nothing(student):
    before = free_cpus()
    student.launch()
    student.launch()
    assert free_cpus() < before
    assert student("day 3 was sunny")[0].strip() == "good"
    student.kill()
    student.kill()
    wait_until(lambda: free_cpus() == before)
    assert student("day 3 was rainy")[0].strip() == "bad"


def test_an_unknown_launch_setting_is_refused(student):
    with pytest.raises(ConfigurationError, match="max_replicas"):
        student.launch({"max_replica": 2})


def test_stock_bootstrap_finetune_trains_with_the_provider(lm):
    program = dspy.Predict("text -> mood")
    program.set_lm(lm.copy(model="raydistill/scratch"))
    teacher = dspy.Predict("text -> mood")
    teacher.set_lm(dspy.utils.DummyLM([{"mood": "good"}] * 4))
    trainset = [dspy.Example(text=f"day {i}", mood="good").with_inputs("text") for i in range(4)]
    optimizer = dspy.BootstrapFinetune(train_kwargs={**RECIPE, "num_train_epochs": 1})
    compiled = optimizer.compile(program, trainset=trainset, teacher=teacher)
    assert "/students/" in compiled.lm.model
