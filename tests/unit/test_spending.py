"""What was paid for: by predictor, and by whom the calls were answered."""

from distill.tracing.spending import cost_usd, paid, paid_by_predictor
from distill.tracing.trace import METRIC, Trace, Usage

KNOWN, UNKNOWN = Usage(1, 10, 2, 0.5), Usage(1, None, None, None)


def trace(**usages):
    named = {METRIC if name == "metric" else name: usage for name, usage in usages.items()}
    return Trace("k", "e", (), None, Usage(), 0.0, usages=named)


def test_usages_add_up_by_predictor():
    found = paid_by_predictor([trace(judge=KNOWN), trace(judge=KNOWN, answer=KNOWN)], ours=False)
    assert found == {"judge": Usage(2, 20, 4, 1.0), "answer": KNOWN}
    assert cost_usd(found) == 1.5


def test_what_is_known_of_a_sum_counts_and_nothing_known_is_unknown():
    found = paid_by_predictor([trace(judge=UNKNOWN), trace(judge=KNOWN)], ours=False)
    assert found == {"judge": Usage(2, 10, 2, 0.5)}
    assert cost_usd(found) == 0.5
    unknown = paid_by_predictor([trace(judge=UNKNOWN), trace(judge=UNKNOWN)], ours=False)
    assert unknown == {"judge": Usage(2, None, None, None)}


def test_of_a_student_only_its_metrics_calls_are_paid():
    assert paid(trace(judge=KNOWN, metric=KNOWN), ours=True) == {METRIC: KNOWN}
