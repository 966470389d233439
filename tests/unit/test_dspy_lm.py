"""DSPy asks students by name, and they answer in every way that DSPy asks."""

import asyncio
import contextlib
import json
import warnings

import dspy
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError

from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from serve import http_api, reach
from serve.dspy_lm import (
    HOPELESS,
    call_usage,
    is_lm_error,
    lm_identity,
    model_name,
    register,
    student_lm,
    student_of,
)
from serve.engines.base import ChatResult, Overloaded, RequestError
from serve.errors import ConfigurationError
from tests import tiny_student

pytestmark = pytest.mark.dspy

ANSWER = "[[ ## team ## ]]\ntech\n\n[[ ## urgent ## ]]\nTrue\n\n[[ ## completed ## ]]\n"
KEY = "sk-the-secret"
TEXT = "nothing works"


class Engine:
    """Answers from a script: texts, or errors that stand for a request alone."""

    def __init__(self, *script) -> None:
        self.script = list(script) or [ANSWER]
        self.requests = []

    def generate(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        self.requests.append(request)
        answer = self.script[min(len(self.requests), len(self.script)) - 1]
        if isinstance(answer, Exception):
            return answer
        return ChatResult(answer, "stop", 7, 4, True)


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A function that gives the name of a student which answers as the engine says."""
    folder = tmp_path / "scripted"
    folder.mkdir()

    def script(engine):
        monkeypatch.setattr(reach, "load_engine", lambda name: engine)
        return model_name(str(folder))

    yield script
    reach.forget(str(folder))


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    """A real student; it has learned nothing, but its grammar makes what it says parse."""
    return tiny_student.make_student(tmp_path_factory.mktemp("student"), epochs=0)


def triage(lm, **about):
    program = tiny_student.Desk(**about)
    program.set_lm(lm)
    return program


def test_a_name_says_which_student_it_is_for(student_dir):
    assert student_of(model_name(str(student_dir))) == str(student_dir)
    assert student_of("raydistill/s3://bucket/a:b") == "s3://bucket/a:b"
    for other in ("openai/gpt-4o-mini", "raydistill", "raydistill/"):
        with pytest.raises(ConfigurationError, match=r"expected raydistill/<student>"):
            student_of(other)


def test_a_student_answers_threads_and_loops_in_its_process(student_dir):
    program = triage(dspy.LM(model_name(str(student_dir)), cache=False))
    first = program(text=TEXT)
    second = asyncio.run(program.triage.acall(text=TEXT))
    examples = [dspy.Example(text=TEXT).with_inputs("text")] * 8
    evaluate = dspy.Evaluate(
        devset=examples,
        metric=lambda example, prediction, trace=None: prediction.team == first.team,
        num_threads=4,
        display_progress=False,
    )
    assert first.toDict() == second.toDict()
    assert evaluate(program).score == 100
    assert call_usage(program.triage.lm.history[-1])[2] == 0


def test_options_reach_the_request_and_n_answers_come_back(scripted):
    engine = Engine("a", "b", "c", "d")
    lm = dspy.LM(scripted(engine), cache=False, temperature=None)
    assert lm("hi", n=2) == ["a", "b"]
    assert asyncio.run(lm.acall("hi", n=2)) == ["c", "d"]
    lm("hi", max_tokens=5, temperature=0.5, top_p=0.9, stop=["x"], seed=3)
    request = engine.requests[-1]
    assert (request.max_tokens, request.temperature, request.top_p) == (5, 0.5, 0.9)
    assert (tuple(request.stop), request.seed) == (("x",), 3)
    assert [one.temperature for one in engine.requests[:4]] == [0.0] * 4


def test_the_prompt_arrives_as_the_adapter_wrote_it(scripted):
    engine = Engine()
    program = triage(dspy.LM(scripted(engine), cache=False))
    program.triage.demos = [dspy.Example(text="a", team="tech", urgent=True)]
    program(text=TEXT)
    expected = dspy.ChatAdapter().format(tiny_student.Triage, program.triage.demos, {"text": TEXT})
    assert list(engine.requests[0].messages) == expected


def test_a_stream_is_the_whole_answer(scripted):
    program = dspy.streamify(triage(dspy.LM(scripted(Engine()), cache=False)))

    async def read():
        return [chunk async for chunk in program(text=TEXT)]

    *chunks, last = asyncio.run(read())
    parts = [chunk.choices[0].delta["content"] or "" for chunk in chunks]
    assert ("".join(parts), last.team) == (ANSWER, "tech")


@pytest.mark.parametrize("student", ["scratch", "/no/such/place"])
def test_what_cannot_answer_ends_a_run_at_once(student):
    lm = dspy.LM(f"raydistill/{student}", cache=False)
    for ask in (lambda: lm("hi"), lambda: asyncio.run(lm.acall("hi"))):
        with pytest.raises(Exception, match=r"not trained yet|no such directory") as caught:
            ask()
        assert is_lm_error(caught.value)
        assert type(caught.value).__name__ in HOPELESS


def test_a_refused_request_is_not_tried_again(scripted):
    engine = Engine(RequestError("too long."))
    lm = dspy.LM(scripted(engine), cache=False)
    for ask in (lambda: lm("hi"), lambda: asyncio.run(lm.acall("hi"))):
        with pytest.raises(Exception, match=r"too long\.") as caught:
            ask()
        assert is_lm_error(caught.value)
        assert type(caught.value).__name__ not in HOPELESS
    assert len(engine.requests) == 2


def test_a_request_that_an_endpoint_refuses_is_not_tried_again():
    chat = Chat()
    chat.engine.script = [RequestError("too long.")]
    with endpoint(chat) as api_base:
        lm = dspy.LM("raydistill//some/student", api_base=api_base, api_key=KEY, cache=False)
        for ask in (lambda: lm("hi"), lambda: asyncio.run(lm.acall("hi"))):
            with pytest.raises(Exception, match=r"too long\.") as caught:
                ask()
            assert is_lm_error(caught.value)
    assert len(chat.engine.requests) == 2


def test_a_student_without_room_is_asked_again(scripted):
    engine = Engine(Overloaded("full"), ANSWER)
    assert dspy.LM(scripted(engine), cache=False)("hi") == [ANSWER]
    assert len(engine.requests) == 2


def test_parts_of_text_are_joined_and_other_parts_refused(scripted):
    engine = Engine()
    lm = dspy.LM(scripted(engine), cache=False)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    lm(messages=[{"role": "user", "content": parts}])
    assert engine.requests[0].messages[0]["content"] == "a b"
    with pytest.raises(Exception, match="a student takes text"):
        lm(messages=[{"role": "user", "content": [*parts, image]}])


class Chat:
    """What an endpoint of ours needs to be served."""

    def __init__(self) -> None:
        self.engine = Engine()

    async def complete(self, request):
        (answer,) = self.engine.generate([request])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def status(self):
        return {}


@contextlib.contextmanager
def endpoint(chat):
    app = http_api.build(None, chat.complete, chat.status, "tickets", KEY)
    with serve_in_background(app) as server:
        yield server.api_base


@pytest.mark.parametrize("by", ["arguments", "environment"])
def test_an_endpoint_is_asked_where_one_is_named(monkeypatch, tmp_path, by):
    chat = Chat()
    with endpoint(chat) as api_base:
        named = {"api_base": api_base, "api_key": KEY}
        if by == "environment":
            monkeypatch.setenv("RAYDISTILL_API_BASE", api_base)
            monkeypatch.setenv("RAYDISTILL_API_KEY", KEY)
            named = {}
        lm = dspy.LM("raydistill//not/on/this/machine", cache=False, **named)
        program = triage(lm)
        assert program(text=TEXT).team == "tech"
        assert asyncio.run(program.triage.acall(text=TEXT)).team == "tech"
        assert chat.engine.requests[0].messages == chat.engine.requests[1].messages
        program.save(str(tmp_path / "program.json"))
        assert KEY not in (tmp_path / "program.json").read_text()
        if by == "environment":
            program.save(str(tmp_path / "program"), save_program=True)
            files = [path for path in (tmp_path / "program").rglob("*") if path.is_file()]
            assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_an_endpoint_that_refuses_the_key_says_so():
    with endpoint(Chat()) as api_base:
        lm = dspy.LM("raydistill//some/student", api_base=api_base, api_key="x", cache=False)
        with pytest.raises(Exception, match=r"answers 401 .*RAYDISTILL_API_KEY") as caught:
            lm("hi")
        assert type(caught.value).__name__ in HOPELESS


def test_nothing_that_is_asked_is_deprecated(scripted):
    async def complete(request):
        return ChatResult(ANSWER, "stop", 7, 4, True)

    async def ask(lm):
        program = triage(lm)
        await asyncio.to_thread(program, text=TEXT)
        await program.triage.acall(text=TEXT)

    async def ask_both():
        await ask(dspy.LM(scripted(Engine()), cache=False))
        await ask(student_lm(complete, asyncio.get_running_loop()))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(ask_both())
    assert [one for one in caught if "dspy" in str(one.message).lower()] == []


def test_registering_again_changes_nothing(scripted):
    lm = dspy.LM(scripted(Engine()), cache=False)
    register()
    register()
    assert lm("hi") == dspy.LM(lm.model, cache=False)("hi")


def test_the_tokens_and_the_price_are_read_off_a_call():
    assert call_usage({"usage": {"prompt_tokens": 3, "completion_tokens": 4}, "cost": 0.5}) == (
        3,
        4,
        0.5,
    )
    assert call_usage({"usage": {}, "cost": None}) == (None, None, None)


def test_an_lm_that_refuses_is_told_from_a_reply_that_does_not_parse():
    def refuse(messages):
        raise TeacherRefuses(401, "no")

    with serve_in_background(StandInTeacher(refuse)) as server:
        lm = dspy.LM("openai/x", api_base=server.api_base, api_key="x", cache=False, num_retries=0)
        with pytest.raises(Exception, match="no") as caught:
            lm("hi")
    assert is_lm_error(caught.value)
    assert type(caught.value).__name__ in HOPELESS
    parse = AdapterParseError("ChatAdapter", dspy.Signature("a -> b"), "gibberish")
    assert not is_lm_error(parse)
    assert not is_lm_error(ValueError("x"))


def test_an_identity_is_how_an_lm_generates_and_not_how_it_is_reached():
    settings = {"model": "openai/gpt-4o-mini", "temperature": 0.0}
    lm = dspy.LM(**settings, api_key=KEY, api_base="http://a", num_retries=9, cache=False)
    assert lm_identity(lm) == settings
    headers = {"extra_headers": {"Authorization": KEY}, "aws_secret_access_key": KEY}
    assert KEY not in json.dumps(lm_identity(dspy.LM(**settings, **headers)))
    assert lm_identity(lm.copy(temperature=1.0)) != lm_identity(lm)
    assert lm_identity(lm.copy(max_tokens=9))["max_tokens"] == 9


def test_lms_of_other_classes_have_identities_that_differ_with_what_they_hold():
    first, second = DummyLM([{"a": "b"}]), DummyLM([{"a": "c"}])
    assert lm_identity(first) == lm_identity(DummyLM([{"a": "b"}]))
    assert lm_identity(first) != lm_identity(second)
    assert json.loads(json.dumps(lm_identity(first))) == lm_identity(first)
    # Looking used up none of its answers.
    assert "b" in first("hi")[0]
