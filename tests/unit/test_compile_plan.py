"""What a compile refuses before it asks a teacher anything, and what it decides to do."""

import threading

import dspy
import pytest

from distill import RayBootstrapFinetune, RayProvider, preflight
from distill.compile_plan import make_plan
from serve.errors import ConfigurationError
from tests.programs import Retrieving, Sentiment, TwoSteps, Unpicklable, build

pytestmark = pytest.mark.dspy

TRAINSET = [dspy.Example(text=f"day {n}", mood="good").with_inputs("text") for n in range(3)]


@pytest.fixture
def teacher_lm():
    """An LM that nobody answers for."""
    lm = dspy.LM("openai/teacher", api_base="http://127.0.0.1:9", api_key="none")
    with dspy.context(lm=lm):
        yield lm


@pytest.fixture
def optimizer(tmp_path, teacher_lm):
    def make(**options):
        given = {"student_model": "scratch", "storage": str(tmp_path / "runs"), **options}
        return RayBootstrapFinetune(**given)

    return make


def plan(optimizer, student=None, trainset=TRAINSET, teacher=None, valset=None):
    return make_plan(optimizer, student or build(), trainset, teacher, valset)


def refused(message):
    return pytest.raises(ConfigurationError, match=message)


def test_the_refusal_is_compiles_own_and_leaves_nothing_behind(optimizer, tmp_path):
    with refused("trainset is empty"):
        optimizer().compile(build(), trainset=[])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_student_without_lms_needs_a_student_model(optimizer):
    with refused(r'Predictor 0 \(answer\) does not have an LM.*student_model, such as "scratch"'):
        plan(optimizer(student_model=None), TwoSteps())


def test_choosing_by_the_metric_is_refused_with_what_can_be_had(optimizer):
    with refused(
        r"train_kwargs\['select_by'\]='metric': a fine-tuning job knows rows, and no program.*"
        r"'exact' or 'loss', or raydistill run"
    ):
        plan(optimizer(train_kwargs={"select_by": "metric"}))


def test_an_lm_that_cannot_be_fine_tuned_is_refused(optimizer):
    student = build()
    student.set_lm(dspy.LM("anthropic/claude"))
    with refused("anthropic/claude, cannot be fine-tuned.*Give the optimizer a student_model"):
        plan(optimizer(student_model=None), student)


def test_lms_that_can_be_fine_tuned_are(optimizer):
    lms = [dspy.LM("raydistill/scratch", provider=RayProvider()) for _ in range(2)]
    student = TwoSteps()
    for predictor, lm in zip(student.predictors(), lms, strict=True):
        predictor.lm = lm
    made = plan(optimizer(student_model=None), student, teacher=TwoSteps())
    assert list(made.keys) == [(lm, None) for lm in lms]
    assert [group.lm for group in made.groups] == lms


def test_a_teacher_without_an_lm_is_refused(optimizer):
    with dspy.context(lm=None), refused(r"dspy.configure\(lm=.*teacher.set_lm\(lm\)"):
        plan(optimizer())


def test_a_teacher_of_another_structure_is_refused(optimizer):
    with refused("teacher: does not fit the student: .* number of predictors .* 2 != 1"):
        plan(optimizer(), TwoSteps(), teacher=build())
    with refused("do not match at index 0: 'answer' != 'self'|names"):
        plan(optimizer(), dspy.ChainOfThought(Sentiment), teacher=build())


def test_a_teacher_that_shares_predictors_with_the_student_is_refused(optimizer):
    student = build()
    with refused("share the following predictor"):
        plan(optimizer(), student, teacher=student)


@pytest.mark.parametrize("teacher", [TwoSteps, "gpt", [TwoSteps(), 3]])
def test_a_teacher_that_is_no_program_is_refused(optimizer, teacher):
    with refused(r"teacher.*expected a dspy.Module"):
        plan(optimizer(), TwoSteps(), teacher=teacher)


def test_no_teachers_at_all_are_refused(optimizer):
    with refused("teacher is an empty list"):
        plan(optimizer(), teacher=[])


def test_an_empty_trainset_is_refused(optimizer):
    with refused("trainset is empty"):
        plan(optimizer(), trainset=[])


@pytest.mark.parametrize("name", ["trainset", "valset"])
def test_examples_whose_inputs_are_not_set_are_refused(optimizer, name):
    examples = [*TRAINSET, dspy.Example(text="x")]
    with refused(rf"{name}\[3\] does not say .* inputs. Call .with_inputs"):
        plan(optimizer(), **{name: examples})


def test_examples_that_the_program_cannot_be_called_with_are_refused(optimizer):
    wrong = [dspy.Example(question="x").with_inputs("question")]
    with refused(r"trainset\[0\].inputs\(\)=\['question'\] does not fit"):
        plan(optimizer(), TwoSteps(), trainset=wrong)
    with refused(r"trainset\[0\] is a dict; expected a dspy.Example"):
        plan(optimizer(), trainset=[{"text": "x"}])


def test_a_class_in_the_place_of_an_instance_is_refused(optimizer):
    with refused("an instance and not the class"):
        plan(optimizer(), TwoSteps)


def test_a_program_without_predictors_is_refused(optimizer):
    with refused("no predictors to fine-tune"):
        plan(optimizer(), dspy.Module())


def two(example, prediction):
    return True


def four(example, prediction, trace, name):
    return True


@pytest.mark.parametrize("metric", [two, four, 3, lambda: True])
def test_a_metric_that_cannot_be_called_is_refused(optimizer, metric):
    with refused(r"metric: expected a function \(example, prediction, trace=None\)"):
        plan(optimizer(metric=metric))


@pytest.mark.parametrize("metric", [bool.__call__, lambda *given: True, dspy.evaluate.SemanticF1()])
def test_any_metric_that_takes_three_values_will_do(optimizer, metric):
    assert plan(optimizer(metric=metric)).has_metric


def test_an_unknown_training_setting_is_refused_with_the_nearest(optimizer):
    with refused(r"learning_rat\b.*learning_rate"):
        plan(optimizer(train_kwargs={"learning_rat": 1e-4}))


def test_settings_given_by_lm_must_be_given_for_all(optimizer):
    one, other = (dspy.LM("raydistill/scratch", provider=RayProvider()) for _ in range(2))
    student = TwoSteps()
    for predictor, lm in zip(student.predictors(), (one, other), strict=True):
        predictor.lm = lm
    with refused("train_kwargs: is given by LM, but not for raydistill/scratch"):
        plan(optimizer(student_model=None, train_kwargs={one: {}}), student)


class Wordless(dspy.Adapter):
    """Knows how to ask, and not how an answer is written."""

    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": str(inputs)}]


def test_an_adapter_that_cannot_write_answers_is_refused(optimizer):
    with refused("Wordless cannot write the answers of self.*Use dspy.ChatAdapter"):
        plan(optimizer(adapter=Wordless()))
    with dspy.context(adapter=Wordless()), refused("Wordless cannot write the answers"):
        plan(optimizer())


def test_what_cannot_be_sent_to_workers_is_refused_by_name(optimizer):
    with refused(r"program.lock: _thread.lock cannot be sent.*in a setup hook"):
        plan(optimizer(), Unpicklable())
    lock = threading.Lock()
    with refused("metric .uses lock.: _thread.lock cannot be sent"):
        plan(optimizer(metric=lambda example, prediction, trace: lock.locked()))
    with dspy.context(rm=lock), refused("dspy.settings.rm: _thread.lock cannot be sent"):
        plan(optimizer(), Retrieving())


class LockedLM(dspy.BaseLM):
    def __init__(self):
        super().__init__("locked", "chat", 0.0, 100, False)
        self.client = threading.Lock()

    def copy(self, **kwargs):
        return self


def test_an_lm_that_cannot_be_sent_is_named_with_its_attribute(optimizer):
    with dspy.context(lm=LockedLM()), refused("LockedLM.*: lm.client: _thread.lock"):
        plan(optimizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "short"}, "prompt='short': expected 'folded' or 'full'"),
        ({"trace": {"concurency": 3}}, r"trace: .*concurency.*concurrency"),
        ({"trace": {"actors": 0}}, r"trace: .*actors"),
        ({"setup": "module:function"}, "setup: .*Expected a function .program."),
        ({"scratch": {"hidden_sizes": 64}}, r"scratch: .*hidden_sizes.*hidden_size"),
    ],
)
def test_a_wrong_option_is_refused_where_it_is_given(optimizer, options, message):
    with refused(message):
        optimizer(**options)


def test_a_student_model_that_does_not_exist_is_refused(optimizer, tmp_path):
    with refused("nowhere cannot be loaded: .* Expected a Hugging Face id, a folder"):
        plan(optimizer(student_model=str(tmp_path / "nowhere")))


def test_a_teacher_that_only_a_configuration_can_have_served_is_refused(optimizer):
    with dspy.context(lm=dspy.LM("ray/org/model")), refused(r"raydistill/org/model.*lm\.launch"):
        plan(optimizer())


def test_a_student_model_that_is_no_language_model_is_refused(optimizer, tmp_path):
    with refused(str(tmp_path)):
        plan(optimizer(student_model=str(tmp_path)))


def test_one_student_for_all_predictors_or_one_for_each(optimizer):
    (together,) = plan(optimizer(), TwoSteps()).groups
    assert list(together.prompts) == ["answer", "judge"]
    apart = plan(optimizer(multitask=False), TwoSteps()).groups
    assert [list(group.prompts) for group in apart] == [["answer"], ["judge"]]
    assert len({group.key for group in apart}) == 2


@pytest.mark.parametrize(
    ("asked", "actors", "smallest", "largest"),
    [
        (None, None, 2, 2),
        (1, None, 1, 1),
        (5, None, 2, 2),
        (64, None, 2, 2),
        (64, {"min": 1, "max": 64}, 1, 8),
        (64, {"min": 16, "max": 64}, 16, 16),
        (2, {"min": 4, "max": 8}, 2, 2),
    ],
)
def test_no_more_examples_are_in_flight_than_num_threads(
    optimizer, monkeypatch, asked, actors, smallest, largest
):
    monkeypatch.setattr(preflight, "capacity", {"CPU": 8.0}.get)
    given = plan(optimizer(num_threads=asked, trace={"actors": actors} if actors else None))
    trace = preflight.fitted_actors(given.trace, in_flight=given.num_threads)
    assert (trace.min_actors, trace.max_actors) == (smallest, largest)
    in_flight = trace.max_actors * trace.concurrency
    assert (asked or 64) - largest < in_flight <= (asked or 64)


def test_another_method_in_the_place_of_training_trains_what_it_likes(optimizer):
    student = build()
    student.set_lm(dspy.LM("anthropic/claude"))
    mine = optimizer(student_model=None)
    mine.finetune_lms = lambda jobs: {key: key[0] for key in jobs}
    assert plan(mine, student).groups
