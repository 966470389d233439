"""The governor of a run: one limiter for many processes, whoever of them dies."""

from distill.tracing.gate import Report
from distill.tracing.governor import SILENT_S, Governor
from distill.tracing.permits import Ask, Bounds, Ended, Outcome, Stop

ASK = Ask("m")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def governor(**bounds):
    clock = Clock()
    return Governor(Bounds(**bounds), clock), clock


def asking(holder, number=1, **said):
    return Report(holder, asks=[ASK] * number, **said)


def test_processes_share_one_limit():
    run, clock = governor(requests_per_minute=5)
    first = run.exchange(asking("a", 3)).permits
    second = run.exchange(asking("b", 3)).permits
    assert [permit is not None for permit in [*first, *second]] == [True] * 5 + [False]
    assert run.exchange(asking("b")).wait_s > 0
    clock.now = 63.0
    assert run.exchange(asking("b")).permits[0]


def test_what_a_dead_process_held_is_free_again():
    run, clock = governor(budget_usd=1.0)
    first = run.exchange(asking("dead")).permits[0]
    done = [(first.id, Outcome(Ended.ANSWERED, 1, 0.3))]
    held = run.exchange(asking("dead", 9, outcomes=done)).permits
    assert sum(permit is not None for permit in held) == 2
    assert run.exchange(asking("alive")).permits == [None]
    clock.now = SILENT_S - 1
    assert run.exchange(asking("alive")).permits == [None]
    clock.now = SILENT_S + 1
    assert run.exchange(asking("alive")).permits[0]


def test_a_process_that_speaks_up_keeps_what_it_holds():
    run, clock = governor(requests_per_minute=1, budget_usd=1.0)
    permit = run.exchange(asking("slow")).permits[0]
    for _ in range(10):
        clock.now += SILENT_S - 1
        run.exchange(asking("slow", 0))
        assert run.exchange(asking("other")).permits == [None]
    over = Report("slow", outcomes=[(permit.id, Outcome(Ended.ANSWERED, 1, 2.0))])
    run.exchange(over)
    assert run.exchange(asking("other")).stopped is Stop.BUDGET


def test_permits_that_come_back_are_given_to_others():
    run, _ = governor(requests_per_minute=1)
    permit = run.exchange(asking("a")).permits[0]
    assert run.exchange(asking("b")).permits == [None]
    run.exchange(Report("a", returned=[permit.id]))
    assert run.exchange(asking("b")).permits[0]
