"""When tracing stops: decisions, tested as values."""

import pytest

from distill.tracing.limits import Counts, Limits, explain, should_stop
from distill.tracing.permits import Stop
from distill.tracing.trace import Failure, FailureKind


def counts(finished=0, failed=0, cost=0.0, kind=FailureKind.PROGRAM, name="ValueError"):
    counted = Counts()
    for number in range(finished):
        failure = Failure(kind, name, "it broke\nbadly") if number < failed else None
        counted.add(failure, cost / finished)
    return counted


@pytest.mark.parametrize(
    ("counted", "limits", "expected"),
    [
        (counts(), Limits(max_failure_rate=0.2), None),
        (counts(10, 10), Limits(max_failure_rate=0.2), None),
        (counts(20, 4), Limits(max_failure_rate=0.2), None),
        (counts(20, 5), Limits(max_failure_rate=0.2), Stop.FAILURES),
        (counts(20, 20), Limits(max_failure_rate=1.0), None),
        (counts(20, 1), Limits(max_failure_rate=0.0), Stop.FAILURES),
        (counts(10, 0, cost=1.0), Limits(budget_usd=1.05), None),
        (counts(1, 1, kind=FailureKind.PREVENTED, name="budget"), Limits(), Stop.BUDGET),
        (counts(1, 1, kind=FailureKind.PREVENTED, name="lost"), Limits(), Stop.LOST),
        (counts(1, 1, kind=FailureKind.TEACHER, name="LMAuthError"), Limits(), Stop.HOPELESS),
        (counts(1, 1, kind=FailureKind.TEACHER, name="LMTimeoutError"), Limits(), None),
        (counts(1, 1, name="LMAuthError"), Limits(), None),
    ],
)
def test_decision(counted, limits, expected):
    assert should_stop(counted, limits, total=1000) is expected


def test_a_small_run_is_judged_when_it_is_over():
    assert should_stop(counts(3, 3), Limits(max_failure_rate=0.2), total=3) is Stop.FAILURES
    assert should_stop(counts(2, 2), Limits(max_failure_rate=0.2), total=3) is None


def test_what_was_prevented_is_neither_finished_nor_failed():
    counted = counts(20, 4)
    counted.add(Failure(FailureKind.PREVENTED, "budget", "spent"), 0.5)
    assert (counted.finished, counted.failed, counted.cost_usd) == (20, 4, 0.5)


@pytest.mark.parametrize("reason", list(Stop))
def test_an_explanation_says_what_was_found_and_what_to_do(reason):
    text = explain(reason, counts(20, 5), Limits(max_failure_rate=0.2, budget_usd=1.0))
    assert text.endswith(".")
    assert any(word in text for word in ("again", "Correct", "Remove"))


def test_the_most_common_failure_is_said_first_and_in_one_line():
    counted = counts(5, 3)
    counted.add(Failure(FailureKind.PARSE, "AdapterParseError", "no header"), None)
    assert counted.worst() == "3 x ValueError: it broke; 1 x AdapterParseError: no header"


def test_an_explanation_tells_what_the_teacher_said():
    counted = counts(1, 1, kind=FailureKind.PREVENTED, name="hopeless")
    assert "it broke" in explain(Stop.HOPELESS, counted, Limits())


def test_what_jobs_have_spent_adds_up():
    limits = Limits(budget_usd=3.0, spent_usd=1.0).after(0.5)
    assert (limits.budget_usd, limits.spent_usd) == (3.0, 1.5)
