"""What callers see over HTTP, with a stand-in for the student and the real program."""

import asyncio

import dspy
import openai
import pytest
from fastapi.testclient import TestClient

from serve import http_api
from serve.engines.base import ChatResult, RequestError
from serve.errors import ConfigurationError
from serve.folding import Folding
from serve.program_runner import ProgramRunner
from serve.student import Manifest
from tests import tiny_student

pytestmark = pytest.mark.dspy

ANSWER = "[[ ## team ## ]]\ntech\n\n[[ ## urgent ## ]]\nTrue\n\n[[ ## completed ## ]]\n"
KEY = "a secret: key"
CHAT = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}]}


class Student:
    """Answers as it is told: with a text, or by raising."""

    def __init__(self) -> None:
        self.answer = ANSWER
        self.error = None
        self.requests = []

    async def complete(self, request):
        self.requests.append(request)
        if self.error:
            raise self.error
        return ChatResult(self.answer, "stop", 7, 4, True)

    async def status(self):
        if self.error:
            raise self.error
        return {"folded_prompts": len(self.requests), "full_prompts": 0}


@pytest.fixture
def student():
    return Student()


@pytest.fixture(params=["build", "build_async"])
def client(request, student, tmp_path):
    return make_client(student, tmp_path, f"tests.tiny_student:{request.param}")


@pytest.fixture
def chat_client(student, tmp_path):
    return make_client(student, tmp_path)


def make_client(student, folder, factory="tests.tiny_student:build", api_key=None):
    folding = Folding.learn({"triage": (tiny_student.Triage, [])}, dspy.ChatAdapter())
    tiny_student.manifest(folding, factory).save(folder)
    tiny_student.build().save(str(folder / "program.json"))
    runner = ProgramRunner(str(folder), student.complete, 4, "tickets")
    app = http_api.build(runner, student.complete, student.status, "tickets", api_key)
    return TestClient(app, raise_server_exceptions=False)


def test_a_student_without_a_program_has_its_chat_and_health_alone(student):
    app = http_api.build(None, student.complete, student.status, "tickets", None)
    client = TestClient(app)
    assert client.post("/predict", json={}).status_code == 404
    assert client.get("/healthz").json()["status"] == "ok"
    reply = client.post("/v1/chat/completions", json=CHAT)
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER


def test_predict_gives_the_programs_typed_outputs(client):
    reply = client.post("/predict", json={"text": "help"})
    assert (reply.status_code, reply.json()) == (200, {"team": "tech", "urgent": True})


def test_the_programs_setup_hook_is_called_before_the_first_run(student, tmp_path):
    make_client(student, tmp_path, "tests.tiny_student:build_open")
    assert asyncio.run(run(student, tmp_path, setup=None)) == "the desk is closed"
    found = asyncio.run(run(student, tmp_path, "tests.tiny_student:open_desk"))
    assert found == {"team": "tech", "urgent": True}
    jammed = asyncio.run(run(student, tmp_path, "tests.tiny_student:jam_desk"))
    assert "setup: jam_desk(program) raised OSError: the drawer is jammed" in jammed


async def run(student, folder, setup):
    """What a run of the student's program gives, or the message of what it raises."""
    Manifest.load(folder).model_copy(update={"setup": setup}).save(folder)
    runner = ProgramRunner(str(folder), student.complete, 4, "tickets")
    try:
        await runner.start()
        return await runner.run({"text": "help"})
    except (RuntimeError, ConfigurationError) as error:
        return str(error)


def test_the_schema_is_typed_by_the_signature(chat_client):
    schemas = chat_client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["Inputs"]["properties"]["text"]["type"] == "string"
    assert schemas["Inputs"]["additionalProperties"] is False
    assert schemas["Outputs"]["properties"]["team"]["enum"] == ["billing", "tech", "sales"]
    assert schemas["Outputs"]["properties"]["urgent"]["type"] == "boolean"


@pytest.mark.parametrize(
    ("body", "field"), [({}, "text"), ({"text": 1}, "text"), ({"text": "a", "txt": 1}, "txt")]
)
def test_a_bad_input_is_422_and_named(chat_client, body, field):
    reply = chat_client.post("/predict", json=body)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", field]


def test_an_unparseable_answer_is_502(client, student):
    student.answer = "gibberish"
    reply = client.post("/predict", json={"text": "help"})
    assert reply.status_code == 502
    assert reply.json()["detail"]["error"] == "unparseable_answer"
    assert len(student.requests) == 1


def test_a_broken_program_is_500_with_its_reason(chat_client):
    reply = chat_client.post("/predict", json={"text": "crash"})
    assert reply.status_code == 500
    assert reply.json()["detail"] == {
        "error": "program_failed",
        "message": "RuntimeError: the program is broken",
    }


def test_an_unanswerable_input_is_422(client, student):
    student.error = RequestError("the prompt has 900 tokens")
    reply = client.post("/predict", json={"text": "help"})
    assert reply.status_code == 422
    assert reply.json()["detail"]["error"] == "unanswerable"


def test_an_overloaded_student_is_503_with_retry_after(client, student):
    student.error = http_api.Overloaded("full")
    for path, body in (("/predict", {"text": "help"}), ("/v1/chat/completions", CHAT)):
        reply = client.post(path, json=body)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert client.get("/healthz").json() == {"status": "busy"}


def test_health_includes_the_student(chat_client, student):
    assert chat_client.get("/healthz").json()["status"] == "ok"
    student.error = RuntimeError("dead")
    reply = chat_client.get("/healthz")
    assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")


def test_chat_takes_the_options_of_the_openai_client(chat_client, student):
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="-", http_client=chat_client)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    answer = api.chat.completions.create(
        model="tickets",
        messages=[{"role": "user", "content": parts}],
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop="END",
        seed=4,
        n=2,
        user="someone",
        logit_bias={},
    )
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    assert answer.usage.total_tokens == 7 + 8
    request = student.requests[0]
    assert list(request.messages) == [{"role": "user", "content": "hi"}]
    assert (request.max_tokens, request.temperature, request.top_p) == (9, 0.5, 0.9)
    assert request.stop == ("END",)
    assert [request.seed for request in student.requests] == [4, 5]
    assert [model.id for model in api.models.list()] == ["tickets"]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"stream": True}, 400, "stream"),
        ({"messages": []}, 400, "messages"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        ({"model": "gpt-4o"}, 404, "model"),
    ],
)
def test_a_chat_that_is_refused_says_so_in_openais_shape(chat_client, changes, status, param):
    reply = chat_client.post("/v1/chat/completions", json=CHAT | changes)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert error["message"]


def test_errors_of_the_engine_keep_openais_shape(chat_client, student):
    student.error = RequestError("the prompt has 900 tokens")
    reply = chat_client.post("/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
    student.error = RuntimeError("dead")
    reply = chat_client.post("/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize("path", ["/predict", "/docs", "/openapi.json", "/v1/models", "/nowhere"])
@pytest.mark.parametrize("given", [None, "Bearer wrong", KEY, "Bearer ", "Basic " + KEY])
def test_without_the_key_there_is_only_401(student, tmp_path, path, given):
    client = make_client(student, tmp_path, api_key=KEY)
    reply = client.get(path, headers={"Authorization": given} if given else {})
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert KEY not in reply.text


def test_with_the_key_everything_answers_and_health_needs_none(student, tmp_path):
    client = make_client(student, tmp_path, api_key=KEY)
    assert client.get("/healthz").status_code == 200
    headers = {"Authorization": f"Bearer {KEY}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.post("/predict", json={"text": "x"}, headers=headers).status_code == 200
