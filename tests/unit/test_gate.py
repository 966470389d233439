"""A process's gate: batches, and loses no permit whoever waits, gives up or is stopped."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distill.tracing.gate import Gate, Stopped
from distill.tracing.governor import Governor
from distill.tracing.permits import Ask, Bounds, Ended, Outcome, Stop

ASK = Ask("m")
DONE = Outcome(Ended.ANSWERED, 1, 0.0)


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
        gate.leave(first, Outcome(Ended.ANSWERED, 1, 2.0))
        with pytest.raises(Stopped) as stopped:
            waiting.result()
    assert stopped.value.stop is Stop.BUDGET
    with pytest.raises(Stopped):
        gate.enter(ASK)


def test_a_limiter_that_is_gone_fails_the_calls():
    def gone(report):
        raise ConnectionError("the governor is gone")

    with pytest.raises(ConnectionError):
        Gate(gone).enter(ASK)


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


def test_a_permit_that_is_not_used_goes_back():
    governor = Counting()
    gate = Gate(governor.exchange)
    permits = [gate.enter(ASK) for _ in range(8)]
    for permit in permits:
        gate.leave(permit, DONE)
    wait_until(lambda: governor.outcomes() + governor.returned() == governor.granted > 8)
