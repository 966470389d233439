"""What was paid for: by predictor, and by whom the calls were answered."""

from distill.tracing.spending import Spending, paid
from distill.tracing.trace import METRIC, Trace, Usage

KNOWN, UNKNOWN = Usage(1, 10, 2, 0.5), Usage(1, None, None, None)


def trace(**usages):
    named = {METRIC if name == "metric" else name: usage for name, usage in usages.items()}
    return Trace("k", "e", (), None, Usage(), 0.0, usages=named)


def total(*traces):
    spending = Spending()
    for each in traces:
        spending.add(each)
    return spending


def test_usages_add_up_by_predictor():
    found = total(trace(judge=KNOWN), trace(judge=KNOWN, answer=KNOWN))
    assert found.by_predictor == {"judge": Usage(2, 20, 4, 1.0), "answer": KNOWN}
    assert found.cost_usd == 1.5


def test_a_sum_with_an_unknown_part_is_unknown_and_a_budget_goes_by_the_known_ones():
    found = total(trace(judge=UNKNOWN), trace(judge=KNOWN))
    assert found.by_predictor == {"judge": Usage(2, None, None, None)}
    assert found.cost_usd == 0.5


def test_of_a_student_only_its_metrics_calls_are_paid():
    assert paid(trace(judge=KNOWN, metric=KNOWN), ours=True) == {METRIC: KNOWN}
