"""The errors: each crosses processes, and is what a caller would catch."""

import pickle

import pytest

from serve import errors
from serve.errors import CallPrevented, DistillError

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, DistillError)
]


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("found 1, expected 2")))
    assert type(error) is kind
    assert str(error) == "found 1, expected 2"


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not DistillError])
def test_an_error_is_also_a_standard_one(kind):
    assert issubclass(kind, ValueError | RuntimeError)


def test_why_a_call_was_prevented_survives_pickling():
    error = pickle.loads(pickle.dumps(CallPrevented("no more", "budget")))
    assert (str(error), error.stop) == ("no more", "budget")
