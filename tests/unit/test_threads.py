"""Threads that are used again: results, errors and contexts get through; one may hang."""

import contextvars
import threading

import pytest

from distill.tracing import threads

NAME = contextvars.ContextVar("name", default="none")


def test_work_runs_elsewhere_in_this_context():
    NAME.set("this")
    future = threads.start(lambda: (NAME.get(), threading.get_ident()))
    assert threads.has_ended(future, 5)
    name, thread = future.result()
    assert name == "this"
    assert thread != threading.get_ident()


def test_an_error_is_raised_where_the_result_is_asked_for():
    future = threads.start(lambda: 1 / 0)
    assert threads.has_ended(future, 5)
    with pytest.raises(ZeroDivisionError):
        future.result()


def test_an_error_that_is_a_timeout_has_ended_all_the_same():
    def raise_it():
        raise TimeoutError("its own")

    future = threads.start(raise_it)
    with pytest.raises(TimeoutError, match="its own"):
        future.result()
    assert threads.has_ended(future, 0)


def test_what_hangs_is_not_waited_for_and_keeps_nobody_else():
    release = threading.Event()
    hanging = threads.start(release.wait)
    assert not threads.has_ended(hanging, 0.01)
    assert [threads.start(lambda n=n: n).result(5) for n in range(50)] == list(range(50))
    release.set()
    assert threads.has_ended(hanging, 5)
