"""What becomes of a failed call, and what an LM's error is taken to say."""

import pytest

from distill.tracing.permits import Ended
from distill.tracing.retries import CallFailure, GiveUp, Retry, StopAll, decide
from serve.dspy_lm import LmFailure, lm_failure, retry_after_s


def decided(ended, attempt=0, max_retries=3, after=None):
    return decide(CallFailure(ended, after), attempt, max_retries, lambda: 0.5)


@pytest.mark.parametrize(
    ("ended", "attempt", "max_retries", "expected"),
    [
        (Ended.DOWN, 0, 3, Retry),
        (Ended.DOWN, 2, 3, Retry),
        (Ended.DOWN, 3, 3, GiveUp),
        (Ended.DOWN, 0, 0, GiveUp),
        (Ended.TIMED_OUT, 0, 1, Retry),
        (Ended.TIMED_OUT, 1, 1, GiveUp),
        (Ended.REFUSED, 3, 3, Retry),
        (Ended.REFUSED, 12, 3, GiveUp),
        (Ended.REFUSED, 0, 0, GiveUp),
        (Ended.OTHER, 0, 3, GiveUp),
        (Ended.HOPELESS, 0, 3, StopAll),
        (Ended.HOPELESS, 0, 0, StopAll),
    ],
)
def test_decision(ended, attempt, max_retries, expected):
    assert type(decided(ended, attempt, max_retries)) is expected


def test_waits_double_up_to_a_minute_and_are_not_all_the_same():
    assert [decided(Ended.DOWN, attempt, 99).after_s for attempt in (0, 1, 2, 20)] == [
        0.75,
        1.5,
        3.0,
        45.0,
    ]
    first = [decide(CallFailure(Ended.DOWN), 0, 3, lambda j=j: j).after_s for j in (0.0, 0.9)]
    assert first[0] < first[1]


def test_a_retry_is_not_before_the_teacher_wants_it():
    assert decided(Ended.REFUSED, after=20.0).after_s == 20.0
    assert decided(Ended.DOWN, after=0.0).after_s == 0.75


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
        (error("LMTransportError"), LmFailure.DOWN),
        (ConnectionResetError(), LmFailure.DOWN),
        (error("LMAuthError", status=401), LmFailure.HOPELESS),
        (error("APIError", status_code=402), LmFailure.HOPELESS),
        (error("LMInvalidRequestError", status=404), LmFailure.HOPELESS),
        (error("LMInvalidRequestError", status=400), LmFailure.OTHER),
        (ValueError("status"), LmFailure.OTHER),
    ],
)
def test_an_error_is_read_by_name_and_status(raised, expected):
    assert lm_failure(raised) is expected
    assert Ended(lm_failure(raised)) == expected


def test_the_teachers_wish_is_read_off_the_error():
    assert retry_after_s(error("LMRateLimitError", retry_after=7.0)) == 7.0
    assert retry_after_s(error("X", litellm_response_headers={"retry-after": "7"})) == 7.0
    past = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert retry_after_s(error("X", litellm_response_headers=past)) == 0.0
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "inf"}):
        assert retry_after_s(error("X", litellm_response_headers=nothing)) is None
    assert retry_after_s(ValueError()) is None
