"""Keys of LMs and other objects: out of every pickle, and back where it is loaded."""

import os

import cloudpickle
import dspy
import pytest

from distill import secrets
from serve.errors import ConfigurationError

pytestmark = pytest.mark.dspy

KEY = "sk-" + "secret-of-the-tests"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in secrets.variables():
        monkeypatch.delenv(name)
    yield
    for name in secrets.variables():
        del os.environ[name]


class OwnLM(dspy.BaseLM):
    def __init__(self, token):
        super().__init__("own", "chat", 0.0, 100, False)
        self.token = token


class Client:
    def __init__(self, api_key, token):
        self.api_key, self.token = api_key, token


def lm(**settings):
    return dspy.LM("openai/x", temperature=0.5, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": KEY},
        {"aws_secret_access_key": KEY},
        {"extra_headers": {"Authorization": f"Bearer {KEY}", "X-Name": "a"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_lms_keys_are_left_out_and_put_back(settings):
    payload = secrets.dumps(lm(**settings))
    assert KEY.encode() not in payload
    assert cloudpickle.loads(payload).kwargs == lm(**settings).kwargs


def test_keys_are_found_wherever_a_program_holds_its_lms():
    own, other = OwnLM(KEY), lm(api_key=KEY)
    program = dspy.Predict("a -> b")
    program.lm, program.ask = own, lambda: other
    payload = secrets.dumps(program)
    assert KEY.encode() not in payload
    loaded = cloudpickle.loads(payload)
    assert (loaded.lm.token, loaded.ask().kwargs["api_key"]) == (KEY, KEY)


def test_an_lm_is_pickled_without_its_history():
    asked = lm()
    asked.history.append({"prompt": "what was asked"})
    assert b"what was asked" not in secrets.dumps(asked)
    assert asked.history


def test_the_original_keeps_its_keys():
    original = lm(api_key=KEY)
    secrets.dumps(original)
    assert original.kwargs["api_key"] == KEY


def test_an_objects_attribute_with_a_variables_value_is_a_key(monkeypatch):
    monkeypatch.setenv("SEARCH_API_KEY", KEY)
    payload = secrets.dumps(Client(KEY, "a word"))
    assert KEY.encode() not in payload
    assert b"a word" in payload
    assert vars(cloudpickle.loads(payload)) == {"api_key": KEY, "token": "a word"}


def test_where_the_key_is_not_it_is_said_which_variable_lacks(monkeypatch):
    payload = secrets.dumps(lm(api_key=KEY))
    [variable] = secrets.variables()
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigurationError, match=variable):
        cloudpickle.loads(payload)


def test_equal_keys_have_one_variable_whose_name_tells_nothing():
    secrets.dumps([lm(api_key=KEY), OwnLM(KEY)])
    [(variable, value)] = secrets.variables().items()
    assert value == KEY
    assert "secret" not in variable.lower()


def test_a_text_is_scrubbed_of_the_environments_keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("SHORT_API_KEY", "none")
    assert secrets.scrubbed(f"401: {KEY} is wrong, none fits") == "401: *** is wrong, none fits"
