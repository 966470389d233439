"""The limiter, told the time: what it promises holds whatever is asked and whatever ends when."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.tracing.backoff import OUTAGE_AFTER, OUTAGE_LIMIT_S
from distill.tracing.limiter import LINE_S, Limiter
from distill.tracing.permits import Ask, Bounds, Outcome, Permit, Refusal, Stop, Wait
from serve.dspy_lm import LmFailure

ASK = Ask("m")


def limiter(**bounds):
    return Limiter(Bounds(**bounds), jitter=lambda: 0.5)


def permitted(limits, now, ask=ASK):
    permit = limits.ask(now, ask)
    assert isinstance(permit, Permit), permit
    return permit


def answered(tokens=None, cost_usd=None):
    return Outcome(None, tokens, cost_usd)


def stopped(limits, now, ask=ASK):
    refusal = limits.ask(now, ask)
    return refusal.stop if isinstance(refusal, Refusal) else None


def down(limits, now, count=OUTAGE_AFTER):
    permits = [permitted(limits, now) for _ in range(count)]
    for permit in permits:
        limits.finish(now, permit.id, Outcome(LmFailure.DOWN))


class Teacher:
    """Simulates callers and a teacher, in order of time; keeps when what arrived."""

    def __init__(self, limits, callers, draw):
        self.limits, self.draw = limits, draw
        self.arrived, self.most_in_flight = [], 0
        self.events = [(draw.uniform(0, 1), number, "ask", None) for number in range(callers)]
        heapq.heapify(self.events)

    def run(self, seconds, outcome):
        order = len(self.events)
        while self.events and self.events[0][0] < seconds:
            now, _, what, permit = heapq.heappop(self.events)
            order += 1
            if what == "end":
                self.limits.finish(now, permit.id, outcome())
                heapq.heappush(self.events, (now, order, "ask", None))
                continue
            if what == "sent":
                self.limits.sent(now, permit.id)
                continue
            answer = self.limits.ask(now, ASK)
            self.most_in_flight = max(self.most_in_flight, self.limits.in_flight)
            if isinstance(answer, Permit):
                took = self.draw.choice([0.01, 0.5, 3, 30, 90]) * self.draw.uniform(0.5, 1)
                arrived = now + self.draw.uniform(0, took)
                self.arrived.append(arrived)
                told = arrived + self.draw.choice([0.0, 2.0])
                if told < now + took:
                    heapq.heappush(self.events, (told, order, "sent", answer))
                heapq.heappush(self.events, (now + took, order, "end", answer))
            elif isinstance(answer, Wait):
                assert answer.seconds > 0
                heapq.heappush(self.events, (now + answer.seconds, order, "ask", None))
        return sorted(self.arrived)


def most_in_a_minute(times, amounts=None):
    amounts = amounts or [1] * len(times)
    most, start, running = 0, 0, 0
    for end, time in enumerate(times):
        running += amounts[end]
        while times[start] <= time - 60 + 1e-9:
            running -= amounts[start]
            start += 1
        most = max(most, running)
    return most


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(1, 50), st.integers(0))
def test_no_sliding_minute_sees_more_requests_than_allowed(limit, callers, seed):
    teacher = Teacher(limiter(requests_per_minute=limit), callers, random.Random(seed))
    times = teacher.run(400, answered)
    assert most_in_a_minute(times) <= limit


def test_the_requests_that_are_allowed_are_made():
    limits, now, made = limiter(requests_per_minute=60), 0.0, 0
    while now < 600:
        answer = limits.ask(now, ASK)
        if isinstance(answer, Permit):
            limits.finish(now + 0.01, answer.id, answered())
            made += 1
        else:
            now += answer.seconds
    assert made >= 0.98 * 600


@given(st.lists(st.integers(1, 500), min_size=5, max_size=200), st.integers(500, 2000))
def test_tokens_of_a_minute_stay_under_the_limit_by_the_largest_surprise(sizes, limit):
    limits, now, made = limiter(tokens_per_minute=limit), 0.0, []
    for size in sizes:
        while not isinstance(answer := limits.ask(now, ASK), Permit):
            now += answer.seconds
        made.append((now, size))
        limits.finish(now + 0.1, answer.id, answered(size))
        now += 0.2
    most = most_in_a_minute([time for time, _ in made], [size for _, size in made])
    # One at a time: what a call takes beyond the expected is known before the next.
    assert most <= limit + max(sizes)


def test_a_call_larger_than_the_limit_goes_alone():
    limits = limiter(requests_per_minute=2)
    first = permitted(limits, 0, Ask("m", requests=5))
    assert isinstance(limits.ask(0, ASK), Wait)
    limits.finish(2, first.id, answered())
    assert isinstance(limits.ask(61.9, ASK), Wait)
    assert isinstance(limits.ask(62, ASK), Permit)


def test_a_request_counts_until_a_minute_after_it_is_known_to_have_left():
    limits = limiter(requests_per_minute=1)
    call = permitted(limits, 0)
    assert isinstance(limits.ask(100, ASK), Wait)
    limits.sent(100, call.id)
    limits.finish(130, call.id, answered())
    assert isinstance(limits.ask(159, ASK), Wait)
    permitted(limits, 160)


def test_long_calls_are_made_as_often_as_is_allowed():
    limits, made = limiter(requests_per_minute=60), []
    for now in range(600):
        while isinstance(answer := limits.ask(now, ASK), Permit):
            made.append((now, answer.id))
        for began, call in made:
            if began == now - 2:
                limits.sent(now, call)
            if began == now - 40:
                limits.finish(now, call, answered())
    assert len(made) >= 0.95 * 600


def test_fractions_of_tokens_never_block_a_run_for_ever():
    limits, now = limiter(tokens_per_minute=100), 0.0
    for tokens in [33, 7, 12, 1, 29, 55, 100] * 30:
        while isinstance(answer := limits.ask(now, ASK), Wait):
            now += answer.seconds
            assert now < 1e5
        limits.finish(now, answer.id, answered(tokens))


def test_an_ask_of_many_requests_is_not_starved_by_small_ones():
    limits, many, now = limiter(requests_per_minute=10), Ask("m", 8), 0.0
    while now < 600:
        now += 1
        if isinstance(limits.ask(now, many), Permit):
            break
        while isinstance(answer := limits.ask(now, ASK), Permit):
            limits.finish(now, answer.id, answered())
    assert now < 200


def test_who_is_gone_from_the_line_holds_nobody_up():
    limits, many = limiter(requests_per_minute=10), Ask("m", 8)
    for _ in range(5):
        permitted(limits, 0)
    assert isinstance(limits.ask(0, many), Wait)
    assert isinstance(limits.ask(1, ASK), Wait)
    permitted(limits, LINE_S + 1)


@given(st.lists(st.floats(0.001, 1), min_size=30, max_size=60), st.integers(1, 20))
def test_spending_passes_the_budget_by_no_more_than_the_calls_in_flight(costs, width):
    limits, budget = limiter(budget_usd=3.0), 3.0
    flying, now, spent = [], 0.0, 0.0
    for cost in costs:
        answer = limits.ask(now, ASK)
        if isinstance(answer, Permit):
            flying.append((answer, cost))
        if isinstance(answer, Refusal):
            break
        if flying and (isinstance(answer, Wait) or len(flying) >= width):
            permit, cost = flying.pop(0)
            limits.finish(now, permit.id, answered(10, cost))
            spent += cost
        now += 1
    under_way = sum(cost for _, cost in flying)
    assert spent + under_way <= budget + under_way + max(costs)
    assert limits.spent_usd == pytest.approx(spent)


def test_calls_of_one_price_never_pass_the_budget():
    limits, flying, spent = limiter(budget_usd=1.0), [], 0.0
    for now in range(1000):
        answer = limits.ask(now, ASK)
        if isinstance(answer, Permit):
            flying.append(answer)
        elif isinstance(answer, Refusal):
            break
        else:
            limits.finish(now, flying.pop(0).id, answered(10, 0.03))
            spent += 0.03
    assert limits.refusal.stop is Stop.BUDGET
    assert 0.9 < spent + 0.03 * len(flying) <= 1.0


def test_with_a_budget_the_first_call_of_a_model_goes_alone():
    limits = limiter(budget_usd=1.0)
    first = permitted(limits, 0)
    assert isinstance(limits.ask(0, ASK), Wait)
    assert isinstance(limits.ask(0, Ask("other")), Permit)
    limits.finish(1, first.id, answered(10, 0.01))
    permitted(limits, 1)
    permitted(limits, 1)


def test_a_budget_without_a_price_stops():
    limits = limiter(budget_usd=1.0)
    limits.finish(1, permitted(limits, 0).id, answered(10, None))
    assert stopped(limits, 1) is Stop.UNPRICED


def test_refusals_halve_the_calls_in_flight_once_for_all_under_way():
    limits = limiter()
    permits = [permitted(limits, 0) for _ in range(64)]
    for permit in permits[:20]:
        limits.finish(1, permit.id, Outcome(LmFailure.REFUSED))
    for permit in permits[20:]:
        limits.finish(2, permit.id, answered())
    flying = 0
    while isinstance(limits.ask(3, ASK), Permit):
        flying += 1
    assert 30 <= flying <= 36


def test_successes_let_the_calls_in_flight_grow_again():
    limits, draw = limiter(), random.Random(0)
    permits = [permitted(limits, 0) for _ in range(64)]
    for permit in permits:
        limits.finish(1, permit.id, Outcome(LmFailure.REFUSED))
    teacher = Teacher(limits, 200, draw)
    teacher.run(600, answered)
    assert teacher.most_in_flight > 100


def test_one_hanging_connection_in_a_hundred_changes_nothing():
    limits = limiter()
    for now in range(1000):
        ended = LmFailure.TIMED_OUT if now % 100 == 0 else None
        limits.finish(now, permitted(limits, now).id, Outcome(ended))
    for _ in range(200):
        permitted(limits, 1000)


def test_many_timeouts_halve_the_calls_in_flight():
    limits = limiter()
    permits = [permitted(limits, 0) for _ in range(64)]
    for number, permit in enumerate(permits):
        ended = LmFailure.TIMED_OUT if number % 3 == 0 else None
        limits.finish(1, permit.id, Outcome(ended))
    flying = 0
    while isinstance(limits.ask(3, ASK), Permit):
        flying += 1
    assert flying < 64


def test_everybody_waits_as_long_as_the_teacher_says():
    limits = limiter()
    permit = permitted(limits, 0)
    limits.finish(1, permit.id, Outcome(LmFailure.REFUSED, retry_after_s=7))
    for now in (1, 4, 7.9):
        wait = limits.ask(now, ASK)
        assert isinstance(wait, Wait)
        assert now + wait.seconds >= 8
    permitted(limits, 8.1)


def test_an_outage_lets_one_probe_through_at_a_time_and_ends_with_its_reply():
    limits = limiter()
    down(limits, 0)
    assert isinstance(limits.ask(0.1, ASK), Wait)
    probe = permitted(limits, 2)
    assert probe.outages == 1
    assert probe.probe
    assert isinstance(limits.ask(2, ASK), Wait)
    limits.finish(3, probe.id, Outcome(LmFailure.DOWN))
    assert isinstance(limits.ask(3.5, ASK), Wait)
    again = permitted(limits, 6)
    limits.finish(6, again.id, answered())
    for _ in range(20):
        permitted(limits, 6)


def test_a_probe_that_is_given_back_makes_way_for_another():
    limits = limiter()
    down(limits, 0)
    limits.give_back(permitted(limits, 2).id)
    permitted(limits, 3)


def test_an_outage_that_does_not_end_stops_the_run():
    limits, now = limiter(), 0.0
    down(limits, now)
    while now < OUTAGE_LIMIT_S:
        answer = limits.ask(now, ASK)
        if isinstance(answer, Permit):
            limits.finish(now, answer.id, Outcome(LmFailure.DOWN))
        now += 10
    assert stopped(limits, now + 1) is Stop.OUTAGE


def test_single_server_errors_are_no_outage():
    limits = limiter()
    for now in range(100):
        down(limits, now, OUTAGE_AFTER - 1)
        limits.finish(now, permitted(limits, now).id, answered())


def test_a_hopeless_call_stops_all():
    limits = limiter()
    limits.finish(1, permitted(limits, 0).id, Outcome(LmFailure.HOPELESS))
    assert stopped(limits, 1) is Stop.HOPELESS


def test_a_permit_that_is_given_back_is_free_at_once():
    limits = limiter(requests_per_minute=1)
    limits.give_back(permitted(limits, 0).id)
    permitted(limits, 0)
    assert limits.in_flight == 1


@pytest.mark.parametrize("bound", ["requests_per_minute", "tokens_per_minute", "budget_usd"])
def test_calls_need_not_ask_only_where_there_is_nothing_to_keep_to(bound):
    unbounded, bounded = limiter(), limiter(**{bound: 1000})
    for limits in (unbounded, bounded):
        limits.finish(0, permitted(limits, 0).id, answered(1, 0.1))
    assert unbounded.free(0) == {"m": 0}
    assert bounded.free(0) == {}


@pytest.mark.parametrize("failure", [LmFailure.REFUSED, LmFailure.DOWN])
def test_a_model_in_trouble_is_asked_for_and_others_are_not(failure):
    limits, other = limiter(), Ask("other")
    permitted(limits, 0, other)
    calls = [limits.admit(ASK) for _ in range(OUTAGE_AFTER)]
    assert limits.free(0) == {"m": 0, "other": 0}
    for call in calls:
        limits.finish(1, call, Outcome(failure))
    assert limits.free(1) == {"other": 0}


def test_refusals_of_calls_that_did_not_ask_halve_once():
    limits = limiter()
    calls = [limits.admit(ASK) for _ in range(64)]
    for now, call in enumerate(calls[:32]):
        limits.finish(now, call, Outcome(LmFailure.REFUSED))
    assert limits.in_flight == 32
    for call in calls[32:]:
        limits.finish(40, call, answered())
    flying = 0
    while isinstance(limits.ask(41, ASK), Permit):
        flying += 1
    assert 30 <= flying <= 36


def test_each_model_has_its_own_trouble():
    limits, judge = limiter(), Ask("judge")
    down(limits, 0)
    assert isinstance(limits.ask(0, ASK), Wait)
    permit = permitted(limits, 0, judge)
    limits.finish(0, permit.id, Outcome(LmFailure.REFUSED, retry_after_s=600))
    assert isinstance(limits.ask(5, judge), Wait)
    limits.finish(5, permitted(limits, 5).id, answered())
    for _ in range(50):
        permitted(limits, 5)


def test_a_call_without_tokens_cannot_be_held_to_a_limit_of_them():
    limits = limiter(tokens_per_minute=1000)
    limits.finish(1, permitted(limits, 0).id, answered(None, 0.1))
    assert stopped(limits, 1) is Stop.UNCOUNTED


@pytest.mark.parametrize("failure", [LmFailure.TIMED_OUT, LmFailure.ABANDONED])
def test_a_call_that_nobody_waits_for_is_taken_to_be_billed(failure):
    limits = limiter(budget_usd=1.0)
    limits.finish(0, permitted(limits, 0).id, answered(10, 0.4))
    limits.finish(1, permitted(limits, 1).id, Outcome(failure))
    assert limits.spent_usd == pytest.approx(0.8)
    assert stopped(limits, 1) is Stop.BUDGET


def test_a_hopeless_call_says_why():
    limits = limiter()
    limits.finish(1, permitted(limits, 0).id, Outcome(LmFailure.HOPELESS, said="no such model"))
    assert limits.ask(1, ASK) == Refusal(Stop.HOPELESS, "no such model")


def test_another_job_has_its_own_budget_and_the_same_minute():
    limits = limiter(requests_per_minute=1, budget_usd=1.0)
    limits.finish(1, permitted(limits, 0).id, answered(1, 2.0))
    assert stopped(limits, 2) is Stop.BUDGET
    limits.begin(Bounds(requests_per_minute=1, budget_usd=5.0, spent_usd=2.0))
    assert isinstance(limits.ask(2, ASK), Wait)
    permitted(limits, 62)


def test_an_answer_from_dspys_cache_says_nothing_of_what_the_next_call_takes():
    limits = limiter(tokens_per_minute=1_000)
    limits.finish(0, permitted(limits, 0).id, answered(0, 0.0))
    permitted(limits, 1)
    assert isinstance(limits.ask(1, ASK), Wait)


def test_a_call_that_was_given_up_for_lost_is_paid_all_the_same():
    limits = limiter(budget_usd=1.0)
    permit = permitted(limits, 0)
    limits.lose(9, permit.id)
    limits.finish(10, permit.id, answered(1, 2.0))
    assert limits.in_flight == 0
    assert stopped(limits, 10) is Stop.BUDGET


def test_a_model_that_is_not_served_yet_stops_those_who_ask_it_and_nobody_else():
    limits = limiter(absent="judge")
    permitted(limits, 0.0)
    assert stopped(limits, 0.0, Ask("judge")) is Stop.ABSENT
    limits.begin(Bounds())
    permitted(limits, 1.0, Ask("judge"))
