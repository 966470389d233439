"""Makes batches out of requests that arrive one by one.

Owns the queue in front of an engine and the one thread that the engine runs in. There is
no timer: while a batch runs new requests wait, and the next batch takes what waits. A
single request is thus answered at once, and a crowd in full batches.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from serve.engines.base import ChatRequest, ChatResult, Engine


class Batcher:
    """Feeds an engine from any number of concurrent callers of one event loop.

    Args:
        engine: Answers the batches.
        max_batch_size: Most requests in one batch.
    """

    def __init__(self, engine: Engine, max_batch_size: int = 32) -> None:
        self._engine = engine
        self._max_batch_size = max_batch_size
        self._waiting: deque[tuple[ChatRequest, asyncio.Future[ChatResult]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._runner: asyncio.Task[None] | None = None

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Answer one request, together with whatever else is waiting.

        Raises:
            RequestError: The request cannot be answered as it is.
            Exception: Whatever the engine raised for the batch that held the request.
        """
        answer: asyncio.Future[ChatResult] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await answer

    def close(self) -> None:
        """Release the thread once its batch has ended; call nothing after."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            requests = [request for request, _ in batch]
            results: Sequence[ChatResult | Exception]
            try:
                results = await loop.run_in_executor(self._thread, self._engine.generate, requests)
            # The error belongs to the callers; the next batch is tried all the same.
            except Exception as error:
                results = [error] * len(batch)
            for (_, answer), result in zip(batch, results, strict=True):
                _deliver(answer, result)

    def _next_batch(self) -> list[tuple[ChatRequest, asyncio.Future[ChatResult]]]:
        batch: list[tuple[ChatRequest, asyncio.Future[ChatResult]]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            request, answer = self._waiting.popleft()
            if not answer.done():  # The caller may have gone.
                batch.append((request, answer))
        return batch


def _deliver(answer: asyncio.Future[ChatResult], result: ChatResult | Exception) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
