"""When tracing stops: decisions, tested as values."""

import pytest

from distill.tracing.limits import Counts, Limits, StopReason, explain, should_stop
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
        (counts(), Limits(0.2), None),
        (counts(10, 10), Limits(0.2), None),
        (counts(20, 4), Limits(0.2), None),
        (counts(20, 5), Limits(0.2), StopReason.FAILURES),
        (counts(20, 20), Limits(1.0), None),
        (counts(20, 1), Limits(0.0), StopReason.FAILURES),
        (counts(10, 0, cost=1.0), Limits(budget_usd=2.0), None),
        (counts(10, 0, cost=1.0), Limits(budget_usd=1.05), StopReason.BUDGET),
        (counts(1, 1, kind=FailureKind.TEACHER, name="LMAuthError"), Limits(), StopReason.HOPELESS),
        (counts(1, 1, kind=FailureKind.TEACHER, name="LMTimeoutError"), Limits(), None),
        (counts(1, 1, name="LMAuthError"), Limits(), None),
    ],
)
def test_decision(counted, limits, expected):
    assert should_stop(counted, limits, in_flight=0, total=1000) is expected


def test_a_small_run_is_judged_when_it_is_over():
    assert should_stop(counts(3, 3), Limits(0.2), 0, total=3) is StopReason.FAILURES
    assert should_stop(counts(2, 2), Limits(0.2), 1, total=3) is None


def test_what_is_in_flight_counts_against_the_budget():
    assert should_stop(counts(10, cost=1.0), Limits(budget_usd=2.0), 8, 1000) is None
    assert should_stop(counts(10, cost=1.0), Limits(budget_usd=2.0), 10, 1000) is StopReason.BUDGET


def test_a_budget_without_prices_is_refused_not_ignored():
    counted = counts(1)
    counted.unpriced = True
    assert should_stop(counted, Limits(budget_usd=1.0), 0, 9) is StopReason.UNPRICED
    assert should_stop(counted, Limits(), 0, 9) is None


@pytest.mark.parametrize("reason", list(StopReason))
def test_an_explanation_says_what_was_found_and_what_to_do(reason):
    text = explain(reason, counts(20, 5), Limits(0.2, 1.0))
    assert text.endswith(".")
    assert any(word in text for word in ("again", "Correct", "Remove"))


def test_the_most_common_failure_is_said_first_and_in_one_line():
    counted = counts(5, 3)
    counted.add(Failure(FailureKind.PARSE, "AdapterParseError", "no header"), None)
    assert counted.worst() == "3 x ValueError: it broke; 1 x AdapterParseError: no header"


def test_what_other_jobs_spent_counts_before_the_first_call():
    assert should_stop(Counts(), Limits(budget_usd=1.0, spent_usd=1.0), 0, 9) is StopReason.BUDGET
    assert should_stop(Counts(), Limits(budget_usd=1.0, spent_usd=0.5), 0, 9) is None
