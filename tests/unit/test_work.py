"""What there is to trace: each unit once, hints when they are due, suspects alone."""

import dspy
import pytest

from distill.tracing.work import MAX_DEATHS, Outcome, Work


def make(count=3, samples=1, hints=False):
    examples = {
        f"e{n}": dspy.Example(text=f"{n}", mood="good").with_inputs("text") for n in range(count)
    }
    return Work(examples, "context", samples, hints)


def take_all(work):
    units = []
    while unit := work.take([]):
        units.append(unit)
    return units


def test_every_unit_is_handed_out_once():
    work = make(samples=2)
    units = take_all(work)
    assert [unit.key for unit in units] == list(work.keys)
    assert [(unit.example.text, unit.variant.sample) for unit in units[:3]] == [
        ("0", 0),
        ("0", 1),
        ("1", 0),
    ]
    assert work.remaining == 0
    assert work.total == 6


def test_the_first_samples_key_does_not_depend_on_how_many_there_are():
    assert set(make(samples=1).keys) <= set(make(samples=3, hints=True).keys)
    assert len(make(samples=3, hints=True).keys) == 12


def test_what_is_finished_already_is_not_handed_out():
    work = make()
    key = list(work.keys)[1]
    work.finish(key, Outcome.PASSED)
    assert key not in [unit.key for unit in take_all(work)]


@pytest.mark.parametrize(
    ("outcomes", "due"),
    [
        ([Outcome.REJECTED, Outcome.REJECTED], True),
        ([Outcome.REJECTED, Outcome.UNANSWERED], True),
        ([Outcome.PASSED, Outcome.REJECTED], False),
        ([Outcome.UNANSWERED, Outcome.UNANSWERED], False),
    ],
)
def test_a_hint_is_due_once_all_samples_have_failed(outcomes, due):
    work = make(count=1, samples=2, hints=True)
    first, second = take_all(work)
    work.finish(first.key, outcomes[0])
    assert not take_all(work)
    work.finish(second.key, outcomes[1])
    hints = take_all(work)
    assert [unit.variant.hinted for unit in hints] == ([True] if due else [])
    assert work.total == 2 + due
    for unit in hints:
        work.finish(unit.key, Outcome.REJECTED)
    assert not take_all(work)


def test_a_hint_needs_a_label():
    work = Work({"e": dspy.Example(text="a").with_inputs("text")}, "context", 1, True)
    (unit,) = take_all(work)
    work.finish(unit.key, Outcome.REJECTED)
    assert work.remaining == 0


def test_a_hint_that_was_given_is_not_given_again():
    work = make(count=1, hints=True)
    plain, hint = work.keys
    work.finish(hint, Outcome.REJECTED)
    work.finish(plain, Outcome.REJECTED)
    assert work.remaining == 0
    assert work.total == 2


def test_a_unit_whose_process_died_twice_runs_alone_and_a_third_death_is_the_last():
    work = make()
    first = work.take([])
    assert work.put_back(first.key)
    units = take_all(work)
    assert first.key in [unit.key for unit in units]
    for unit in units:
        assert work.put_back(unit.key)
    assert work.take([units[1].key]).key != first.key
    suspect = work.take([])
    assert suspect.key == first.key
    assert work.take([suspect.key]) is None
    assert not work.put_back(suspect.key)
    assert MAX_DEATHS == 3
