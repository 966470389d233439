"""Calls that whoever waits for them can stop waiting for."""

import threading

import pytest

from distill.tracing import callers


def test_a_call_returns_or_raises_where_it_is_waited_for():
    running = callers.start(lambda: threading.current_thread().name)
    assert running.wait(10)
    assert running.result() == "lm-call"
    failing = callers.start(lambda: int("x"))
    assert failing.wait(10)
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result()


def test_a_call_that_takes_too_long_goes_on_and_holds_up_no_other():
    go_on = threading.Event()
    slow = callers.start(lambda: go_on.wait(10))
    assert not slow.wait(0.01)
    assert callers.start(lambda: 7).wait(10)
    go_on.set()
    assert slow.wait(10)
    assert slow.result() is True


def test_threads_are_used_again():
    def identity():
        running = callers.start(threading.get_ident)
        assert running.wait(10)
        return running.result()

    assert len({identity() for _ in range(200)}) < 20
