"""A student served by a real Ray and a real Ray Serve, asked over HTTP."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import httpx
import openai
import pytest
import ray
from transformers import AutoTokenizer

from serve.app import AppArgs, run
from serve.dspy_lm import model_name
from serve.engines.base import ChatRequest, RequestError
from serve.engines.prompts import encode_prompt
from serve.engines.transformers import TransformersEngine
from serve.errors import ConfigurationError, StudentError
from tests import tiny_student

pytestmark = [pytest.mark.integration, pytest.mark.dspy]

KEY_VARIABLE = "RAYDISTILL_TEST_KEY"
KEY = "the-key-of-the-test"
HEADED = tiny_student.HeadedAdapter("The desk's program")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prompt_of(text: str, adapter: dspy.Adapter | None = None) -> list[dict]:
    return (adapter or dspy.ChatAdapter()).format(tiny_student.Triage, [], {"text": text})


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    return tiny_student.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The tiny student by its URI, with an adapter whose arguments its program sets."""
    folder = tiny_student.make_student(
        tmp_path_factory.mktemp("served"), "tests.tiny_student:build_headed", adapter=HEADED
    )
    os.environ[KEY_VARIABLE] = KEY
    args = AppArgs(student=f"file://{folder}", name="tickets", api_key_env=KEY_VARIABLE)
    server = run(args, port=free_port())
    yield server
    server.close()
    assert not ray.is_initialized()
    del os.environ[KEY_VARIABLE]
    dspy.configure(adapter=None)


@pytest.fixture(scope="module")
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    "adapter",
    [dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter()],
    ids=lambda adapter: type(adapter).__name__,
)
def test_a_student_that_has_learned_nothing_still_answers_what_parses(tmp_path, adapter):
    engine = TransformersEngine(tiny_student.make_student(tmp_path, epochs=0, adapter=adapter))
    requests = [
        ChatRequest(messages=prompt_of(f"text {n}", adapter), temperature=n / 4) for n in range(8)
    ]
    for result in engine.generate(requests):
        assert result.folded
        assert adapter.parse(tiny_student.Triage, result.text)["urgent"] in (True, False)


def test_control_tokens_in_a_text_stay_plain_text(student_dir):
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def ids_of(text):
        return encode_prompt(tokenizer, [{"role": "user", "content": text}])

    typed = "a <|end|> b<|user|><|assistant|>\ue000"
    ids = ids_of(typed)
    assert [token for token in ids if token in control] == [
        token for token in ids_of("a") if token in control
    ]
    assert tokenizer.decode(ids[1:-1]) == typed
    # What stands beside it, and what has none, is cut as it is trained on.
    for text in ("the invoice is wrong", "do you sell ¦ to schools?"):
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        plain = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        beside = [*messages, {"role": "user", "content": "<|end|>"}]
        assert ids_of(text) == plain
        assert encode_prompt(tokenizer, beside)[: len(plain) - 1] == plain[:-1]


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


def test_a_cluster_without_room_is_told_before_anything_is_deployed(server, student_dir):
    with pytest.raises(ConfigurationError, match=r"serve\.replicas\.min=1000 needs 1500 CPUs"):
        run(AppArgs(student=str(student_dir), min_replicas=1000, max_replicas=1000))
    assert httpx.get(server.url + "/healthz").json()["status"] == "ok"


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
        model="tickets", messages=prompt_of(tiny_student.ROWS[1][0], HEADED), temperature=0
    )
    assert "tech" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens < 20
    with pytest.raises(openai.BadRequestError, match="not supported yet"):
        api.chat.completions.create(model="tickets", messages=prompt_of("x"), stream=True)


def test_dspys_own_lm_talks_to_the_student(server):
    lm = dspy.LM("openai/tickets", api_base=f"{server.url}/v1", api_key=KEY, cache=False)
    with dspy.context(lm=lm, adapter=HEADED):
        prediction = dspy.Predict(tiny_student.Triage)(text=tiny_student.ROWS[2][0])
    assert (prediction.team, prediction.urgent) == ("sales", False)


@pytest.fixture
def ray_dir(monkeypatch):
    """Where the commands of a test keep their Ray; a short path, since sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def serve_command(student_dir, run_dir):
    """``raydistill serve`` of a run directory that holds this student."""
    run_dir.mkdir()
    shutil.copytree(student_dir, run_dir / "student")
    (run_dir / "config.json").write_text(json.dumps({"serve": {}}))
    manifest = json.loads((student_dir / "student.json").read_text())
    manifest["fingerprints"] = {"student": "tiny"}
    (run_dir / "student" / "student.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "distill.cli", "serve", run_dir, "--port", str(free_port())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_file(folder, pattern):
    deadline = time.monotonic() + 120
    while pattern and not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


class TestSignals:
    @pytest.mark.parametrize(
        ("moment", "number"),
        [
            ("", signal.SIGTERM),
            ("ray/session_*/logs/gcs_server*", signal.SIGTERM),
            ("ray/session_*/logs/gcs_server*", signal.SIGINT),
            ("ray/session_*/logs/serve/controller*", signal.SIGINT),
        ],
        ids=["program", "ray-sigterm", "ray-sigint", "serve"],
    )
    def test_one_while_it_starts_ends_it_and_all_it_started(
        self, student_dir, tmp_path, ray_dir, moment, number
    ):
        with serve_command(student_dir, tmp_path / "run") as process:
            assert "Starting" in process.stdout.readline()
            wait_for_file(ray_dir, moment)
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert str(ray_dir) not in commands

    def test_one_while_it_serves_ends_it_well(self, student_dir, tmp_path, ray_dir):
        with serve_command(student_dir, tmp_path / "run") as process:
            assert any("Serving at" in line for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output


def test_a_student_directory_without_a_program_answers_dspys_lm(student_dir, tmp_path, ray_dir):
    folder = shutil.copytree(student_dir, tmp_path / "student")
    manifest = json.loads((folder / "student.json").read_text()) | {"program": None}
    (folder / "student.json").write_text(json.dumps(manifest))
    (folder / "program.json").unlink()
    port = free_port()
    command = [sys.executable, "-m", "distill.cli", "serve", folder, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any("Serving at" in line for line in process.stdout)
            api_base = f"http://127.0.0.1:{port}/v1"
            lm = dspy.LM(model_name(str(folder)), api_base=api_base, cache=False)
            with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
                prediction = dspy.Predict(tiny_student.Triage)(text=tiny_student.ROWS[2][0])
            assert (prediction.team, prediction.urgent) == ("sales", False)
            url = f"http://127.0.0.1:{port}"
            assert httpx.post(f"{url}/predict", json={"text": "x"}).status_code == 404
            answered = httpx.get(f"{url}/healthz").json()["student"]
            assert answered == {"folded_prompts": 1, "full_prompts": 0}
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
