"""Programs: imported, described and fingerprinted; what cannot work is named."""

import copy
import dataclasses
import functools
import re
import sys
import threading
from typing import Any

import dspy
import pydantic
import pytest

from distill.fingerprints import code_of
from distill.programs import (
    Task,
    check_inputs,
    code_fingerprint,
    hook_path,
    import_path,
    load_task,
    program_fingerprint,
)
from serve.errors import ConfigurationError
from serve.programs import describe_signature, runs_async
from tests import programs

pytestmark = pytest.mark.dspy


def task(program, metric=None):
    return Task(program, dspy.ChatAdapter(), metric)


def test_a_program_and_its_metric_are_imported_by_path():
    loaded = load_task("tests.programs:build_two_steps", "tests.programs:right_mood")
    assert [name for name, _ in loaded.program.named_predictors()] == ["answer", "judge"]
    assert loaded.metric is programs.right_mood


@pytest.mark.parametrize(
    ("program", "metric", "said"),
    [
        ("no.such.module:build", None, "cannot import no.such.module"),
        ("tests.programs:nope", None, "has no 'nope'"),
        ("tests.programs:not_a_program", None, "gave a str"),
        ("tests.programs:build_broken", None, "no such client"),
        ("tests.programs:build", "tests.programs:not_callable", "expected a function"),
        ("tests.programs:build", "tests.programs:nope", "has no 'nope'"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(program, metric, said):
    with pytest.raises(ConfigurationError) as caught:
        load_task(program, metric)
    assert said in str(caught.value)


def test_what_cannot_be_sent_to_workers_is_named():
    with pytest.raises(ConfigurationError, match=r"^program\.lock: _thread\.lock cannot .* setup"):
        task(programs.Unpicklable()).dumps()


class Holder:
    def __init__(self, **parts):
        vars(self).update(parts)

    def search(self, query):
        return query


class Dropping(Holder):
    """Leaves its lock out of pickles."""

    def __getstate__(self):
        return {name: each for name, each in vars(self).items() if name != "lock"}


class Model(pydantic.BaseModel):
    client: Any


def find_with(client):
    return lambda query: (client, query)


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (Holder(client=LOCK), "program.held.client: _thread.lock"),
        ({"a": [1, Holder(client=LOCK)]}, "program.held['a'][1].client: _thread.lock"),
        (Dropping(lock=LOCK, client=LOCK), "program.held.client: _thread.lock"),
        (Model(client=LOCK), "program.held.client: _thread.lock"),
        (Holder(client=LOCK).search, "program.held.__self__.client: _thread.lock"),
        (find_with(LOCK), "program.held (uses client): _thread.lock"),
        (functools.partial(len, LOCK), "program.held[0]: _thread.lock"),
        ((each for each in "abc"), "program.held: builtins.generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_innermost_part_that_cannot_be_sent_is_named_with_the_way_to_it(held, named):
    program = programs.TwoSteps()
    program.held = held
    with pytest.raises(ConfigurationError) as caught:
        task(program).dumps()
    assert str(caught.value).startswith(f"{named} cannot be sent to Ray's workers")


def test_an_lms_history_is_not_what_cannot_be_sent():
    lm = dspy.LM("openai/x")
    lm.history.append(LOCK)
    program = programs.TwoSteps()
    program.set_lm(lm)
    task(program).dumps()
    lm.client = LOCK
    with pytest.raises(ConfigurationError, match=r"lm\.client: _thread\.lock"):
        task(program).dumps()


def test_what_a_hook_a_metric_or_a_setting_holds_is_named_as_well():
    base = task(programs.TwoSteps())
    for changes, named in (
        ({"setup": find_with(LOCK)}, "setup (uses client): _thread.lock"),
        ({"metric": find_with(LOCK)}, "metric (uses client): _thread.lock"),
        ({"settings": {"rm": Holder(client=LOCK)}}, "dspy.settings.rm.client: _thread.lock"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(named)):
            dataclasses.replace(base, **changes).dumps()


def test_a_setup_hook_is_imported_and_takes_the_program():
    assert load_task("tests.programs:build", None, "tests.programs:connect").setup
    for path, said in (
        ("tests.programs:nope", "has no 'nope'"),
        ("tests.programs:not_callable", "cannot be called with the program"),
        ("tests.programs:right_mood", "cannot be called with the program"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load_task("tests.programs:build", None, path)


def test_a_fingerprint_changes_with_the_code_of_the_setup_hook():
    plain = task(programs.TwoSteps())
    hooks = (None, programs.connect, programs.connect_in_vain, find_with("a"), find_with("b"))
    names = {program_fingerprint(dataclasses.replace(plain, setup=hook)) for hook in hooks}
    assert len(names) == len(hooks)


def test_a_hook_has_a_path_where_it_can_be_imported():
    assert hook_path(programs.connect) == "tests.programs:connect"
    assert hook_path(lambda program: None) is None
    assert hook_path(functools.partial(programs.connect)) is None


def test_inputs_must_fit_the_program():
    check_inputs(programs.TwoSteps(), ["text"])
    with pytest.raises(ConfigurationError, match="does not fit"):
        check_inputs(programs.TwoSteps(), ["txt"])
    with pytest.raises(ConfigurationError, match="does not fit"):
        check_inputs(programs.Async(), ["text", "more"])
    with pytest.raises(ConfigurationError, match="does not fit"):
        check_inputs(dspy.Predict(programs.Reply), ["text"])


def test_only_a_programs_own_aforward_makes_it_async():
    assert runs_async(programs.Async())
    assert not runs_async(programs.TwoSteps())
    assert not runs_async(dspy.ChainOfThought("a -> b"))


def test_a_description_holds_the_types():
    described = describe_signature(programs.Sentiment)
    assert described["instructions"] == "Judge the mood of a text."
    assert described["outputs"]["mood"]["type"]["enum"] == ["good", "bad"]


def test_a_fingerprint_is_the_same_for_the_same_program():
    assert program_fingerprint(task(programs.TwoSteps())) == program_fingerprint(
        task(programs.TwoSteps())
    )


def test_a_fingerprint_changes_with_instructions_demos_types_and_code():
    base = programs.TwoSteps()
    told = copy.deepcopy(base)
    told.judge.signature = told.judge.signature.with_instructions("Judge kindly.")
    shown = copy.deepcopy(base)
    shown.judge.demos = [dspy.Example(text="a", mood="good")]

    class Other(programs.TwoSteps):
        def forward(self, text):
            return super().forward(text=text.lower())

    wider = copy.deepcopy(base)
    wider.judge.signature = wider.judge.signature.with_updated_fields("mood", type_=str)
    variants = [base, told, shown, Other(), wider, dspy.Predict(programs.Sentiment)]
    assert len({program_fingerprint(task(program)) for program in variants}) == len(variants)


def test_a_fingerprint_changes_with_what_modules_hold_and_with_their_lms():
    told = programs.TwoSteps()
    told.judge.lm = dspy.LM("openai/judge")
    variants = [
        programs.Retrieving(),
        programs.Retrieving(("another",)),
        programs.TwoSteps(),
        told,
    ]
    assert len({program_fingerprint(task(program)) for program in variants}) == len(variants)


def test_a_fingerprint_holds_no_address():
    class Holder(dspy.Module):
        def __init__(self):
            super().__init__()
            self.client = object()
            self.judge = dspy.Predict(programs.Sentiment)

    def make():
        adapter = dspy.TwoStepAdapter(dspy.LM("openai/extract"))
        return Task(Holder(), adapter, functools.partial(programs.right_mood, trace=[object()]))

    one, other = make(), make()
    assert program_fingerprint(one) == program_fingerprint(other)
    assert code_fingerprint(one.metric) == code_fingerprint(other.metric)


class Base(dspy.Module):
    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)

    def forward(self, text):
        return self.judge(text=text)


class OtherBase(dspy.Module):
    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(programs.Sentiment)

    def forward(self, text):
        return self.judge(text=text.lower())


def test_the_code_of_base_classes_counts():
    one, other = (type("Program", (base,), {})() for base in (Base, OtherBase))
    assert program_fingerprint(task(one)) != program_fingerprint(task(other))


class Plain:
    def same_mood(example, prediction, trace=None):
        return example.mood == prediction.mood


class Documented:
    def same_mood(example, prediction, trace=None):
        """Documented now."""
        # and commented
        return example.mood == prediction.mood


class Changed:
    def same_mood(example, prediction, trace=None):
        return example.mood != prediction.mood


def test_comments_and_docstrings_of_a_metric_change_nothing_and_its_code_does():
    plain = code_fingerprint(Plain.same_mood)
    assert code_fingerprint(Documented.same_mood) == plain
    assert code_fingerprint(Changed.same_mood) != plain


LEAST = 1


def long_enough(example, prediction, trace=None):
    return len(prediction.mood) >= LEAST


def test_what_a_metric_uses_of_its_module_is_part_of_it(monkeypatch):
    before = code_fingerprint(long_enough)
    assert code_fingerprint(long_enough) == before
    monkeypatch.setattr(sys.modules[__name__], "LEAST", 2)
    assert code_fingerprint(long_enough) != before


def test_lambdas_of_one_line_are_different_metrics():
    one, other = lambda gold, pred, trace=None: gold.a, lambda gold, pred, trace=None: gold.b
    assert code_fingerprint(one) != code_fingerprint(other)


def test_code_without_source_is_known_by_what_it_does():
    def made(attribute):
        scope = {}
        exec(f"class Made:\n    def forward(self):\n        return self.{attribute}", scope)
        return scope["Made"]

    assert code_of(made("a")) == code_of(made("a"))
    assert code_of(made("a")) != code_of(made("b"))


def test_a_compiled_program_is_still_what_its_class_makes():
    program = programs.TwoSteps()
    before = program_fingerprint(task(program))
    program._compiled = True
    assert import_path(program) == "tests.programs:TwoSteps"
    assert program_fingerprint(task(program)) == before
    assert import_path(programs.Retrieving(passages=("snow",))) is None
