"""A process's gate: batches, and loses no permit whoever waits, gives up or is stopped."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distill.tracing.gate import Gate
from distill.tracing.governor import Governor
from distill.tracing.permits import Ask, Bounds, Outcome, Permit, Stop
from serve.dspy_lm import LmFailure
from serve.errors import CallPrevented

ASK = Ask("m")
DONE = Outcome(None, 1, 0.0)


class Counting(Governor):
    """A governor in this process that counts what it is told."""

    def __init__(self, **bounds):
        super().__init__(Bounds(**bounds))
        self.reports, self.granted = [], 0

    def exchange(self, report):
        self.reports.append(report)
        reply = super().exchange(report)
        self.granted += sum(permit is not None for permit in reply.permits)
        return reply

    def outcomes(self):
        return sum(len(report.outcomes) for report in self.reports)

    def returned(self):
        return sum(len(report.returned) for report in self.reports)


def wait_until(true):
    waiting = threading.Event()
    for _ in range(500):
        if true():
            return
        waiting.wait(0.02)
    raise AssertionError("waited in vain")


def test_every_call_is_permitted_once_and_accounted_once():
    governor = Counting()
    gate = Gate(governor.exchange)

    def call(_):
        gate.leave(gate.enter(ASK), DONE)

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(call, range(2000)))
    wait_until(lambda: governor.outcomes() == 2000)
    assert len(governor.reports) < 1000


def test_threads_and_event_loops_share_a_gate():
    governor = Counting()
    gate = Gate(governor.exchange)

    async def acall():
        gate.leave(await gate.aenter(ASK), DONE)

    async def all_of_them():
        threads = [asyncio.to_thread(lambda: gate.leave(gate.enter(ASK), DONE)) for _ in range(20)]
        await asyncio.gather(*threads, *(acall() for _ in range(20)))

    asyncio.run(all_of_them())
    wait_until(lambda: governor.outcomes() == 40)


def test_a_stop_reaches_those_who_wait_and_those_who_come():
    governor = Counting(budget_usd=1.0)
    gate = Gate(governor.exchange)
    first = gate.enter(ASK)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(gate.enter, ASK)
        gate.leave(first, Outcome(None, 1, 2.0))
        with pytest.raises(CallPrevented) as stopped:
            waiting.result()
    assert stopped.value.stop == Stop.BUDGET
    with pytest.raises(CallPrevented):
        gate.enter(ASK)


def test_a_limiter_that_is_gone_fails_the_calls():
    def gone(report):
        raise ConnectionError("the governor is gone")

    gate = Gate(gone)
    for _ in range(2):
        with pytest.raises(CallPrevented, match="the governor is gone") as stopped:
            gate.enter(ASK)
        assert stopped.value.stop == Stop.LOST


def test_who_gives_up_waiting_leaves_no_permit_behind():
    governor = Counting(budget_usd=10.0)
    gate = Gate(governor.exchange)

    async def give_up():
        first = await gate.aenter(ASK)
        impatient = asyncio.create_task(gate.aenter(ASK))
        await asyncio.sleep(0.05)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        gate.leave(first, DONE)
        gate.leave(await gate.aenter(ASK), DONE)

    asyncio.run(give_up())
    wait_until(lambda: governor.outcomes() == 2)


@pytest.mark.parametrize("bounds", [{}, {"requests_per_minute": 10_000}, {"budget_usd": 10.0}])
def test_no_permit_is_asked_for_that_is_not_used(bounds):
    governor = Counting(**bounds)
    gate = Gate(governor.exchange)

    def call(_):
        gate.leave(gate.enter(ASK), DONE)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(call, range(100)))
    wait_until(lambda: governor.outcomes() == 100)
    made = governor.granted + sum(len(report.begun) for report in governor.reports)
    assert made == 100
    assert governor.returned() == 0


def test_where_nothing_is_to_be_kept_calls_do_not_wait_for_the_limiter():
    governor, hold = Counting(), threading.Event()
    hold.set()

    def exchange(report):
        reply = governor.exchange(report)
        hold.wait()
        return reply

    gate = Gate(exchange)
    gate.leave(gate.enter(ASK), DONE)
    wait_until(lambda: governor.outcomes() == 1)
    hold.clear()
    permits = [gate.enter(ASK) for _ in range(50)]
    assert all(permit.id < 0 for permit in permits)
    for permit in permits:
        gate.leave(permit, DONE)
    hold.set()
    wait_until(lambda: governor.outcomes() == 51)


def test_a_refusal_makes_the_next_calls_ask():
    governor = Counting()
    gate = Gate(governor.exchange)
    gate.leave(gate.enter(ASK), DONE)
    first = gate.enter(ASK)
    gate.leave(first, Outcome(LmFailure.REFUSED))
    wait_until(lambda: governor.outcomes() == 2)
    wait_until(lambda: gate.enter(ASK).id > 0)


@pytest.mark.parametrize("bounds", [{}, {"requests_per_minute": 100}])
def test_a_limiter_that_is_slow_to_answer_lets_calls_through_all_the_same(bounds):
    governor = Counting(**bounds)

    def slowly(report):
        threading.Event().wait(0.7)
        return governor.exchange(report)

    gate = Gate(slowly)
    with ThreadPoolExecutor(10) as threads:
        permits = list(threads.map(lambda _: gate.enter(ASK), range(10)))
    assert all(isinstance(permit, Permit) for permit in permits)


def test_what_has_left_is_told():
    governor = Counting(requests_per_minute=10)
    gate = Gate(governor.exchange)
    permit = gate.enter(ASK)
    gate.sent(permit)
    wait_until(lambda: [permit.id] in [list(report.sent) for report in governor.reports])
