"""Requests that arrive one by one are answered in batches, each with its own answer."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.batcher import Batcher
from serve.engines.base import ChatRequest, ChatResult, RequestError
from serve.engines.batches import plan_batches

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def ask(text: str) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}])


class Echo:
    """Answers with the question, once it is let go; refuses and breaks on demand."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult | RequestError]:
        texts = [request.messages[0]["content"] for request in requests]
        self.batches.append(texts)
        self.gate.wait(10)
        if "break" in texts:
            raise RuntimeError("out of memory")
        return [
            RequestError(text) if text == "refuse" else ChatResult(text, "stop", 1, 1, False)
            for text in texts
        ]


async def test_what_arrives_while_a_batch_runs_is_answered_in_full_batches():
    engine = Echo()
    engine.gate.clear()
    batcher = Batcher(engine, max_batch_size=4)
    tasks = [asyncio.create_task(batcher.complete(ask("0")))]
    while not engine.batches:
        await asyncio.sleep(0.001)
    tasks += [asyncio.create_task(batcher.complete(ask(str(i)))) for i in range(1, 10)]
    await asyncio.sleep(0)
    engine.gate.set()
    results = await asyncio.gather(*tasks)
    assert [result.text for result in results] == [str(i) for i in range(10)]
    assert [len(batch) for batch in engine.batches] == [1, 4, 4, 1]
    batcher.close()


async def test_a_refused_request_leaves_its_batch_mates_alone():
    batcher = Batcher(Echo())
    tasks = (batcher.complete(ask(text)) for text in ("a", "refuse", "b"))
    first, refused, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(refused, RequestError)
    assert (first.text, last.text) == ("a", "b")
    batcher.close()


async def test_a_broken_batch_raises_for_its_callers_and_the_next_one_runs():
    batcher = Batcher(Echo())
    with pytest.raises(RuntimeError, match="out of memory"):
        await batcher.complete(ask("break"))
    assert (await batcher.complete(ask("again"))).text == "again"
    batcher.close()


async def test_a_caller_that_has_gone_is_not_answered():
    engine = Echo()
    engine.gate.clear()
    batcher = Batcher(engine)
    first = asyncio.create_task(batcher.complete(ask("first")))
    while not engine.batches:
        await asyncio.sleep(0.001)
    gone = asyncio.create_task(batcher.complete(ask("gone")))
    stays = asyncio.create_task(batcher.complete(ask("stays")))
    await asyncio.sleep(0)
    gone.cancel()
    engine.gate.set()
    assert (await first).text == "first"
    assert (await stays).text == "stays"
    assert engine.batches[1] == ["stays"]
    batcher.close()


@pytest.mark.parametrize(
    "wrong",
    [{"messages": []}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_a_request_out_of_range_is_refused(wrong):
    with pytest.raises(RequestError, match="expected"):
        ChatRequest(**{"messages": [{"role": "user", "content": "x"}], **wrong})


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(["greedy", "sampled"])), max_size=40)
)
def test_batches_hold_each_request_once_of_one_setting_and_little_padding(requests):
    lengths = [length for length, _ in requests]
    settings = [setting for _, setting in requests]
    batches = plan_batches(lengths, settings)
    assert sorted(index for batch in batches for index in batch) == list(range(len(requests)))
    for batch in batches:
        assert len({settings[index] for index in batch}) == 1
        width = max(lengths[index] for index in batch)
        assert width * len(batch) <= 2 * sum(lengths[index] for index in batch)
