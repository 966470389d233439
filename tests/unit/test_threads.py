"""Threads of programs: each in the context of where it was started, which it does not keep."""

import contextvars
import gc
import threading
import weakref

import pytest

from serve.threads import allow_threads

HELD = contextvars.ContextVar("HELD", default=None)


class Held:
    """Something that a context holds."""


class Named(threading.Thread):
    """Runs by a method of its class."""

    def run(self):
        self.found = HELD.get()


class Given(threading.Thread):
    """Runs by what it was given."""

    def __init__(self):
        super().__init__()
        self.run = lambda: setattr(self, "found", HELD.get())


@pytest.mark.parametrize("kind", [Named, Given])
def test_a_thread_runs_in_the_context_of_its_start(kind):
    allow_threads()
    thread = kind()
    HELD.set(held := Held())
    thread.start()
    thread.join()
    assert thread.found is held


def test_a_thread_that_has_ended_keeps_nothing():
    allow_threads()
    held = Held()
    context = contextvars.copy_context()
    context.run(HELD.set, held)
    gc.disable()
    try:
        thread = threading.Thread(target=lambda: None)
        context.run(thread.start)
        thread.join()
        kept = weakref.ref(held)
        del thread, context, held
        assert kept() is None
    finally:
        gc.enable()
