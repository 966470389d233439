"""The governor of a run: one limiter for many processes, whoever of them dies."""

from distill.tracing.gate import Report
from distill.tracing.governor import SILENT_S, Governor
from distill.tracing.permits import Ask, Bounds, Outcome, Stop
from serve.dspy_lm import LmFailure

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
    for name, permits in (("a", first), ("b", second)):
        run.exchange(Report(name, sent=[permit.id for permit in permits if permit]))
    clock.now = 61.0
    assert run.exchange(asking("b")).permits[0]


def test_what_a_dead_process_held_is_taken_to_be_made_and_billed():
    run, clock = governor(requests_per_minute=3, budget_usd=1.0)
    first = run.exchange(asking("dead")).permits[0]
    done = [(first.id, Outcome(None, 1, 0.3))]
    held = run.exchange(asking("dead", 9, outcomes=done)).permits
    assert sum(permit is not None for permit in held) == 2
    assert run.exchange(asking("alive")).permits == [None]
    clock.now = SILENT_S + 1
    reply = run.exchange(asking("alive"))
    assert reply.permits == [None]
    assert reply.refusal.stop is Stop.BUDGET


def test_the_requests_of_a_dead_process_count_for_a_minute_after_its_death():
    run, clock = governor(requests_per_minute=1)
    run.exchange(asking("dead"))
    clock.now = SILENT_S + 1
    assert run.exchange(asking("alive")).permits == [None]
    clock.now += 61
    assert run.exchange(asking("alive")).permits[0]


def test_a_process_that_speaks_up_keeps_what_it_holds():
    run, clock = governor(requests_per_minute=1, budget_usd=1.0)
    permit = run.exchange(asking("slow")).permits[0]
    for _ in range(10):
        clock.now += SILENT_S - 1
        run.exchange(asking("slow", 0))
        assert run.exchange(asking("other")).permits == [None]
    over = Report("slow", outcomes=[(permit.id, Outcome(None, 1, 2.0))])
    run.exchange(over)
    assert run.exchange(asking("other")).refusal.stop is Stop.BUDGET


def test_permits_that_come_back_are_given_to_others():
    run, _ = governor(requests_per_minute=1)
    permit = run.exchange(asking("a")).permits[0]
    assert run.exchange(asking("b")).permits == [None]
    run.exchange(Report("a", returned=[permit.id]))
    assert run.exchange(asking("b")).permits[0]


def test_calls_that_did_not_ask_are_told_of_and_accounted():
    run, _ = governor()
    assert run.exchange(asking("a")).free == {"m": 0}
    begun = [(number, ASK) for number in range(-1, -7, -1)]
    assert run.exchange(Report("a", begun=begun)).free == {"m": 0}
    refused = [(number, Outcome(LmFailure.REFUSED)) for number, _ in begun]
    assert run.exchange(Report("a", outcomes=refused)).free == {}
    assert run.exchange(Report("b")).free == {}


def test_the_more_processes_wait_the_less_often_each_asks():
    run, _ = governor(requests_per_minute=1)
    waits = [run.exchange(asking(str(number))).wait_s for number in range(1000)]
    assert waits[10] < waits[500] < waits[999]
    assert run.exchange(Report("0")).pace_s > governor()[0].exchange(Report("0")).pace_s


def test_a_long_pause_is_said_once_with_its_end(caplog):
    run, _ = governor()
    permits = run.exchange(asking("a", 9)).permits
    wish = Outcome(LmFailure.REFUSED, retry_after_s=3600.0)
    run.exchange(Report("a", outcomes=[(permit.id, wish) for permit in permits]))
    assert len(caplog.messages) == 1
    assert "left alone until 20" in caplog.text
