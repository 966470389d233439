"""A student answers where it is: in this process, or at an endpoint that knows its name."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.standin_teacher import StandInTeacher, serve_in_background
from serve import reach
from serve.engines.base import ChatRequest, ChatResult
from serve.errors import ConfigurationError
from serve.models import full_name

REQUEST = ChatRequest([{"role": "user", "content": "hi"}])


class Engine:
    """Counts the batches that it answers, and in which threads."""

    def __init__(self) -> None:
        self.threads = set()

    def generate(self, requests):
        self.threads.add(threading.current_thread().name)
        return [ChatResult("hello", "stop", 1, 1, False) for _ in requests]


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """The engines loaded so far, by name, in the place of real models."""
    engines = {}

    def load_engine(name):
        engines.setdefault(name, []).append(Engine())
        return engines[name][-1]

    monkeypatch.setattr(reach, "load_engine", load_engine)
    yield engines
    for name in engines:
        reach.forget(name)


def test_a_student_is_loaded_once_however_many_ask(loaded, tmp_path):
    names = [str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: reach.reach(name).answer(REQUEST), names))
    assert {answer.text for answer in answers} == {"hello"}
    assert [len(engines) for engines in loaded.values()] == [1]


def test_threads_and_loops_share_the_one_engine(loaded, tmp_path):
    async def ask():
        return await asyncio.gather(*(reach.reach(tmp_path).aanswer(REQUEST) for _ in range(3)))

    tmp_path = str(tmp_path)
    asyncio.run(ask())
    asyncio.run(ask())
    reach.reach(tmp_path).answer(REQUEST)
    ((engine,),) = loaded.values()
    assert len(engine.threads) == 1


def test_a_forgotten_student_is_looked_for_anew(loaded, tmp_path):
    reach.reach(str(tmp_path))
    reach.forget(str(tmp_path))
    reach.reach(str(tmp_path))
    assert [len(engines) for engines in loaded.values()] == [2]


@pytest.mark.parametrize(
    ("student", "message"),
    [("scratch", "scratch is not trained yet"), ("/no/such/place", "no such directory")],
)
def test_what_cannot_answer_is_told_at_once(student, message):
    with pytest.raises(ConfigurationError, match=message):
        reach.reach(student)


def test_names_are_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    assert full_name("student") == full_name("./student/") == f"{tmp_path}/student"
    assert full_name("s3://bucket/a:b/student/") == "s3://bucket/a:b/student"
    assert full_name("org/model-1.5") == "org/model-1.5"
    assert full_name("runs/not/there") == f"{tmp_path}/runs/not/there"


def test_an_endpoints_one_model_is_the_student_by_whatever_name():
    with serve_in_background(StandInTeacher(lambda messages: "hi")) as server:
        name = reach.served_model(server.api_base, None, "/some/student")
        assert name == reach.served_model(f"{server.api_base}/", "a key", name)
        with pytest.raises(ConfigurationError, match=r"answers 404 .*raydistill serve"):
            reach.served_model(f"{server.url}/nowhere", None, "/some/student")
    with pytest.raises(OSError, match="refused"):
        reach.served_model("http://127.0.0.1:9", None, "/some/student")
