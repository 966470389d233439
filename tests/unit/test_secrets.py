"""Keys of LMs and other objects: out of every pickle, and back where it is loaded."""

import collections
import os
import subprocess
import sys
import types

import cloudpickle
import dspy
import litellm
import pydantic
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
        {"fallbacks": [{"model": "openai/y", "api_key": KEY}]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_lms_keys_are_left_out_and_put_back(settings):
    payload = secrets.dumps(lm(**settings))
    assert KEY.encode() not in payload
    assert secrets.loads(payload).kwargs == lm(**settings).kwargs


def test_keys_are_found_wherever_a_program_holds_its_lms():
    own, other = OwnLM(KEY), lm(api_key=KEY)
    program = dspy.Predict("a -> b")
    program.lm, program.ask = own, lambda: other
    payload = secrets.dumps(program)
    assert KEY.encode() not in payload
    loaded = secrets.loads(payload)
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


class Model(pydantic.BaseModel):
    api_key: str
    hidden: pydantic.SecretStr


class Reducing:
    def __init__(self, key):
        self.key = key

    def __reduce__(self):
        return Reducing, (self.key,)


class Slotted:
    __slots__ = ("key",)

    def __init__(self, key):
        self.key = key


def by_value(source, **names):
    """The function ``f`` of a module that no other process can import, as of a notebook."""
    module = types.ModuleType("a_notebook")
    vars(module).update(names)
    exec(source, vars(module))
    return module.f


@pytest.mark.parametrize(
    ("make", "key_of"),
    [
        (lambda: KEY, lambda loaded: loaded),
        (lambda: Client(KEY, "a"), lambda loaded: loaded.api_key),
        (lambda: Client(None, {"api_key": [KEY]}), lambda loaded: loaded.token["api_key"][0]),
        (lambda: {KEY: 1}, lambda loaded: next(iter(loaded))),
        (lambda: Reducing(KEY), lambda loaded: loaded.key),
        (lambda: Slotted(KEY), lambda loaded: loaded.key),
        (lambda: KEY.encode(), lambda loaded: loaded.decode()),
        (lambda: Model(api_key=KEY, hidden="a"), lambda loaded: loaded.api_key),
        (lambda: Model(api_key="a", hidden=KEY), lambda loaded: loaded.hidden.get_secret_value()),
        (lambda: by_value("def f(): return API_KEY", API_KEY=KEY), lambda loaded: loaded()),
        (lambda: by_value(f"def f(key={KEY!r}): return key"), lambda loaded: loaded()),
        (lambda: by_value(f"def f(): return {KEY!r}"), lambda loaded: loaded()),
        (lambda: (lambda key: lambda: key)(KEY), lambda loaded: loaded()),
    ],
    ids=[
        *("text", "attribute", "nested", "dict key", "reduce", "slots", "bytes", "pydantic"),
        *("SecretStr", "global", "default", "constant", "closure"),
    ],
)
def test_a_variables_key_is_left_out_whatever_holds_it(make, key_of, monkeypatch):
    monkeypatch.setenv("SEARCH_API_KEY", KEY)
    payload = secrets.dumps(make())
    assert KEY.encode() not in payload
    assert key_of(secrets.loads(payload)) == KEY


def test_a_text_keeps_what_is_around_its_keys(monkeypatch):
    other = f"{KEY}-and-more"
    monkeypatch.setenv("SEARCH_API_KEY", KEY)
    monkeypatch.setenv("OTHER_TOKEN", other)
    texts = [f"Bearer {KEY}", f"{KEY}{other}", f"https://{other}:{KEY}@host", "none of them"]
    payload = secrets.dumps(texts)
    assert KEY.encode() not in payload
    assert b"-and-more" not in payload
    assert b"none of them" in payload
    assert secrets.loads(payload) == texts


def test_an_lms_key_is_left_out_also_of_what_is_pickled_before_it():
    payload = secrets.dumps([Client(KEY, f"Bearer {KEY}"), lm(api_key=KEY)])
    assert KEY.encode() not in payload
    assert vars(secrets.loads(payload)[0]) == {"api_key": KEY, "token": f"Bearer {KEY}"}


def test_an_lm_is_loaded_as_it_was():
    original = OwnLM(KEY)
    original.counts = collections.Counter(a=2)
    original.lists = collections.defaultdict(list, api_key=[KEY])
    original.kwargs["itself"] = original.kwargs
    loaded = secrets.loads(secrets.dumps(original))
    assert loaded.token == KEY
    assert (type(loaded.counts), loaded.counts) == (collections.Counter, original.counts)
    assert (loaded.lists.default_factory, loaded.lists) == (list, original.lists)
    assert loaded.kwargs["itself"] is loaded.kwargs


def test_a_dict_that_holds_itself_and_a_key_is_loaded_as_it_was(monkeypatch):
    monkeypatch.setenv("SEARCH_API_KEY", KEY)
    original = {"api_key": KEY}
    original["itself"] = original
    loaded = secrets.loads(secrets.dumps(Client(KEY, original))).token
    assert loaded["itself"] is loaded
    assert loaded["api_key"] == KEY


def test_modules_are_pickled_by_name_whatever_they_hold(monkeypatch):
    monkeypatch.setenv("SEARCH_API_KEY", KEY)
    monkeypatch.setattr(litellm, "api_key", KEY)
    monkeypatch.setattr(sys.modules[__name__], "api_key", KEY, raising=False)
    for module in (litellm, sys.modules[__name__]):
        function = by_value("def f(): return used.api_key", used=module)
        payload = secrets.dumps(function)
        assert payload == cloudpickle.dumps(function)
        assert secrets.loads(payload)() == KEY


def test_a_module_that_loads_its_parts_when_they_are_used_is_left_alone():
    source = (
        "import sys, openai\n"
        "from distill import secrets\n"
        "def f(): return openai.embeddings\n"
        "before = set(sys.modules)\n"
        "secrets.dumps(f)\n"
        "assert not {name for name in set(sys.modules) - before if name.startswith('openai')}\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


def test_where_the_key_is_not_it_is_said_which_variable_lacks(monkeypatch):
    payload = secrets.dumps(lm(api_key=KEY))
    [variable] = secrets.variables()
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigurationError, match=variable):
        secrets.loads(payload)


def test_equal_keys_have_one_variable_whose_name_tells_nothing():
    secrets.dumps([lm(api_key=KEY), OwnLM(KEY)])
    [(variable, value)] = secrets.variables().items()
    assert value == KEY
    assert "secret" not in variable.lower()


def test_a_text_is_scrubbed_of_the_environments_keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("SHORT_API_KEY", "none")
    assert secrets.scrubbed(f"401: {KEY} is wrong, none fits") == "401: *** is wrong, none fits"
