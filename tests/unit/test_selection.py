"""Which traces are learned from, and how the others are counted."""

import itertools

import pytest

from distill.config import TraceConfig
from distill.selection import Selection
from distill.tracing.trace import Failure, FailureKind, Score, Trace, Usage

PARSE = Failure(FailureKind.PARSE, "AdapterParseError", "?")
ERROR = Failure(FailureKind.PROGRAM, "ValueError", "boom")
BROKEN = Score("m", None, "KeyError")
numbers = itertools.count()


def trace(score=None, failure=None, example="e", **changes):
    score = Score("m", score) if isinstance(score, float) else score
    usage = Usage(1, 10, 5, 0.1)
    key = f"k{next(numbers)}"
    return Trace(key, example, (), {"mood": "good"}, usage, 0.0, score, failure, **changes)


def selected(traces, has_metric=True, **config):
    selection = Selection(TraceConfig(**config), has_metric)
    return list(selection.choose(traces)), selection


def test_a_failure_is_never_kept_and_the_metric_filters():
    traces = [trace(1.0), trace(0.0), trace(-1.0), trace(BROKEN)]
    traces += [trace(failure=PARSE), trace(failure=ERROR)]
    kept, selection = selected(traces)
    assert kept == traces[:1]
    assert selection.rejections() == {"metric": 2, "parse": 1, "error": 2}
    assert selected(traces, keep="all")[0] == traces[:4]
    assert selected(traces, has_metric=False)[0] == traces[:4]


def test_a_metric_error_is_not_a_rejection_where_all_is_kept():
    _, selection = selected([trace(BROKEN)], keep="all")
    assert selection.rejections()["error"] == 0


@pytest.mark.parametrize(
    ("keep", "expected"), [("passed", [1, 2, 3]), ("first", [1]), ("best", [2])]
)
def test_of_several_good_traces_of_an_example_all_the_first_or_the_best_are_kept(keep, expected):
    traces = [trace(0.0), trace(0.5), trace(0.9), trace(0.9)]
    kept, selection = selected([*traces, trace(1.0, example="f")], keep=keep)
    assert kept[:-1] == [traces[number] for number in expected]
    assert selection.examples == 2
    assert selection.rejections().get("surplus", 0) == 3 - len(expected)
    assert selection.kept + sum(selection.rejections().values()) == selection.traces


def test_it_counts_what_the_report_says():
    _, selection = selected([trace(1.0), trace(1.0, hinted=True), trace(failure=ERROR)])
    assert (selection.traces, selection.kept, selection.hinted) == (3, 2, 1)
    assert selection.errors == {"boom": 1}
    assert list(selection.outputs) == ["mood"]
