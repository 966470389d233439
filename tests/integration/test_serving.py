"""A student served by a real Ray and a real Ray Serve, asked over HTTP."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import dspy
import httpx
import openai
import pytest
import ray

from serve.app import AppArgs, run
from serve.engines.base import ChatRequest, RequestError
from serve.engines.transformers import TransformersEngine
from serve.errors import StudentError
from tests import tiny_student

pytestmark = pytest.mark.integration

KEY_VARIABLE = "RAYDISTILL_TEST_KEY"
KEY = "the-key-of-the-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prompt_of(text: str) -> list[dict]:
    return dspy.ChatAdapter().format(tiny_student.Triage, [], {"text": text})


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    return tiny_student.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def server(student_dir):
    os.environ[KEY_VARIABLE] = KEY
    args = AppArgs(student=str(student_dir), name="tickets", api_key_env=KEY_VARIABLE)
    server = run(args, port=free_port())
    yield server
    server.close()
    assert not ray.is_initialized()
    del os.environ[KEY_VARIABLE]


@pytest.fixture(scope="module")
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def test_a_student_that_has_learned_nothing_still_answers_what_parses(tmp_path):
    folder = tiny_student.make_student(tmp_path, epochs=0)
    engine = TransformersEngine(folder)
    requests = [ChatRequest(messages=prompt_of(f"text {n}"), temperature=n / 4) for n in range(8)]
    for result in engine.generate(requests):
        assert dspy.ChatAdapter().parse(tiny_student.Triage, result.text)["urgent"] in (True, False)


class TestEngine:
    @pytest.fixture(scope="class")
    def engine(self, student_dir):
        return TransformersEngine(student_dir)

    def test_answers_come_in_order_and_a_bad_request_fails_alone(self, engine):
        long = ChatRequest([{"role": "user", "content": "word " * 500}])
        good = [ChatRequest(prompt_of(text)) for text, _, _ in tiny_student.ROWS]
        first, refused, *rest = engine.generate([good[0], long, *good[1:]])
        assert isinstance(refused, RequestError)
        parsed = [
            dspy.ChatAdapter().parse(tiny_student.Triage, result.text) for result in (first, *rest)
        ]
        assert parsed == [{"team": team, "urgent": urgent} for _, team, urgent in tiny_student.ROWS]
        assert all(result.folded and result.finish_reason == "stop" for result in (first, *rest))

    def test_an_answer_does_not_depend_on_its_batch_mates(self, engine):
        requests = [ChatRequest(prompt_of("x " * count)) for count in range(12)]
        alone = [engine.generate([request])[0].text for request in requests]
        assert [result.text for result in engine.generate(requests)] == alone

    def test_other_prompts_are_answered_as_they_are(self, engine):
        (result,) = engine.generate([ChatRequest([{"role": "user", "content": "hello"}])])
        assert not result.folded

    def test_a_limit_and_a_stop_text_end_an_answer(self, engine):
        messages = prompt_of(tiny_student.ROWS[0][0])
        cut, stopped = engine.generate(
            [ChatRequest(messages, max_tokens=1), ChatRequest(messages, stop=("## ]]",))]
        )
        assert (cut.finish_reason, cut.completion_tokens) == ("length", 1)
        assert (stopped.finish_reason, stopped.text) == ("stop", "[[ ## team ")

    def test_a_seed_makes_a_sampled_answer_repeatable(self, engine):
        request = ChatRequest(prompt_of("unheard of"), temperature=5.0, seed=7)
        first, second = engine.generate([request, request])
        assert first.text == second.text

    def test_a_directory_without_a_model_is_a_student_error(self, student_dir, tmp_path):
        (tmp_path / "student.json").write_text((student_dir / "student.json").read_text())
        with pytest.raises(StudentError, match="cannot be loaded as a model"):
            TransformersEngine(tmp_path)


def test_predict_answers_what_the_student_learned(client):
    for text, team, urgent in tiny_student.ROWS:
        reply = client.post("/predict", json={"text": text})
        assert (reply.status_code, reply.json()) == (200, {"team": team, "urgent": urgent})
        assert reply.headers["x-request-id"]


def test_many_at_once_each_get_their_own_answer(client):
    rows = tiny_student.ROWS * 20
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda row: client.post("/predict", json={"text": row[0]}), rows))
    assert [reply.json()["team"] for reply in replies] == [team for _, team, _ in rows]


def test_bad_input_and_a_broken_program_are_told_apart(client):
    assert client.post("/predict", json={"txt": "x"}).status_code == 422
    assert client.post("/predict", json={"text": "crash"}).status_code == 500
    too_long = client.post("/predict", json={"text": "long " * 500})
    assert (too_long.status_code, too_long.json()["detail"]["error"]) == (422, "unanswerable")


def test_everything_but_health_needs_the_key(server):
    for path in ("/predict", "/docs", "/openapi.json", "/v1/models"):
        assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url + "/healthz").json()["status"] == "ok"


def test_the_documents_are_there(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/predict", "/healthz", "/v1/models", "/v1/chat/completions"} <= set(paths)
    assert client.get("/docs").status_code == 200


def test_openais_client_talks_to_the_student(server):
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    answer = api.chat.completions.create(
        model="tickets", messages=prompt_of(tiny_student.ROWS[1][0]), temperature=0
    )
    assert "tech" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens < 20
    with pytest.raises(openai.BadRequestError, match="not supported yet"):
        api.chat.completions.create(model="tickets", messages=prompt_of("x"), stream=True)


def test_dspys_own_lm_talks_to_the_student(server):
    lm = dspy.LM("openai/tickets", api_base=f"{server.url}/v1", api_key=KEY, cache=False)
    with dspy.context(lm=lm):
        prediction = dspy.Predict(tiny_student.Triage)(text=tiny_student.ROWS[2][0])
    assert (prediction.team, prediction.urgent) == ("sales", False)
