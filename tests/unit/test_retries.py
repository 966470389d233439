"""What becomes of a failed call, and what an LM's error is taken to say."""

import asyncio

import pytest

from distill.tracing.retries import CallFailure, GiveUp, Retry, StopAll, Tries, decide
from serve.dspy_lm import LmFailure, lm_failure, retry_after_s


def decided(failure, attempt=0, max_retries=3, after=None, refused=0, probe=False):
    tries = Tries(attempt, refused)
    return decide(CallFailure(failure, after, probe), tries, max_retries, lambda: 0.5)


@pytest.mark.parametrize(
    ("ended", "attempt", "max_retries", "expected"),
    [
        (LmFailure.DOWN, 0, 3, Retry),
        (LmFailure.DOWN, 2, 3, Retry),
        (LmFailure.DOWN, 3, 3, GiveUp),
        (LmFailure.DOWN, 0, 0, GiveUp),
        (LmFailure.TIMED_OUT, 0, 1, Retry),
        (LmFailure.TIMED_OUT, 1, 1, GiveUp),
        (LmFailure.REFUSED, 3, 3, Retry),
        (LmFailure.REFUSED, 0, 0, GiveUp),
        (LmFailure.ABANDONED, 0, 3, GiveUp),
        (LmFailure.OTHER, 0, 3, GiveUp),
        (LmFailure.HOPELESS, 0, 3, StopAll),
        (LmFailure.HOPELESS, 0, 0, StopAll),
    ],
)
def test_decision(ended, attempt, max_retries, expected):
    assert type(decided(ended, attempt, max_retries)) is expected


def test_refusals_are_counted_apart_from_failures_and_are_more():
    tries, refusals = Tries(), 0
    while isinstance(
        decision := decide(CallFailure(LmFailure.REFUSED), tries, 3, lambda: 0.5), Retry
    ):
        tries, refusals = decision.tries, refusals + 1
    assert (tries.failed, refusals) == (0, 12)
    assert isinstance(decide(CallFailure(LmFailure.DOWN), tries, 3, lambda: 0.5), Retry)


def test_probes_that_find_the_teacher_down_are_counted_apart():
    assert decided(LmFailure.DOWN, 2).tries == Tries(3)
    tries, probes = Tries(3), 0
    down = CallFailure(LmFailure.DOWN, probe=True)
    while isinstance(decision := decide(down, tries, 3, lambda: 0.5), Retry):
        tries, probes = decision.tries, probes + 1
    assert (tries.failed, probes) == (3, 12)
    assert isinstance(decided(LmFailure.TIMED_OUT, 3, probe=True), GiveUp)


def test_waits_double_up_to_a_minute_and_are_not_all_the_same():
    assert [decided(LmFailure.DOWN, attempt, 99).after_s for attempt in (0, 1, 2, 20)] == [
        0.75,
        1.5,
        3.0,
        45.0,
    ]
    first = [
        decide(CallFailure(LmFailure.DOWN), Tries(), 3, lambda j=j: j).after_s for j in (0.0, 0.9)
    ]
    assert first[0] < first[1]


def test_a_retry_is_not_before_the_teacher_wants_it():
    assert decided(LmFailure.REFUSED, after=20.0).after_s == 20.0
    assert decided(LmFailure.DOWN, after=0.0).after_s == 0.75


def test_a_long_pause_is_waited_for_at_the_limiter_where_a_stop_is_heard():
    assert decided(LmFailure.REFUSED, after=86_400.0).after_s == 60.0


def error(name, *bases, **attributes):
    made = type(name, bases or (Exception,), {})(attributes.pop("text", "it broke"))
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (error("LMRateLimitError", status=429), LmFailure.REFUSED),
        (error("RateLimitError", status_code=429), LmFailure.REFUSED),
        (error("RateLimitError", status_code=429, text="insufficient_quota"), LmFailure.HOPELESS),
        (error("LMTimeoutError"), LmFailure.TIMED_OUT),
        (error("Timeout", status_code=408), LmFailure.TIMED_OUT),
        (TimeoutError(), LmFailure.TIMED_OUT),
        (error("LMServerError", status=503), LmFailure.DOWN),
        (error("APIError", status_code=502), LmFailure.DOWN),
        (error("LMServerError", status=500), LmFailure.BROKEN),
        (error("InternalServerError"), LmFailure.BROKEN),
        (error("LMTransportError"), LmFailure.DOWN),
        (ConnectionResetError(), LmFailure.DOWN),
        (error("LMAuthError", status=401), LmFailure.HOPELESS),
        (error("APIError", status_code=402), LmFailure.HOPELESS),
        (error("LMInvalidRequestError", status=404), LmFailure.HOPELESS),
        (error("LMInvalidRequestError", status=400), LmFailure.OTHER),
        (ValueError("status"), LmFailure.OTHER),
        (asyncio.CancelledError(), LmFailure.ABANDONED),
    ],
)
def test_an_error_is_read_by_name_and_status(raised, expected):
    assert lm_failure(raised) is expected


def test_the_teachers_wish_is_read_off_the_error():
    assert retry_after_s(error("LMRateLimitError", retry_after=7.0)) == 7.0
    assert retry_after_s(error("X", litellm_response_headers={"retry-after": "7"})) == 7.0
    past = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert retry_after_s(error("X", litellm_response_headers=past)) == 0.0
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "inf"}):
        assert retry_after_s(error("X", litellm_response_headers=nothing)) is None
    assert retry_after_s(ValueError()) is None
