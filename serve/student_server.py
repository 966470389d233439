"""The deployment that holds the student: an engine behind a batcher.

A plain class; ``app`` makes a Ray Serve deployment of it.
"""

from serve.batcher import Batcher
from serve.engines.base import ChatRequest, ChatResult
from serve.models import load_engine


class StudentServer:
    """Answers chat completions, in batches.

    Args:
        student: A student directory, a Hugging Face model directory, or a hub id.
        max_batch_size: Most requests generated together.
        num_threads: CPU threads to compute with; None leaves torch's choice.
    """

    def __init__(self, student: str, max_batch_size: int, num_threads: int | None) -> None:
        self._batcher = Batcher(load_engine(student, num_threads), max_batch_size)
        self._folded = 0
        self._full = 0

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Answer one request. See ``Batcher.complete``."""
        result = await self._batcher.complete(request)
        self._folded += result.folded
        self._full += not result.folded
        return result

    async def status(self) -> dict[str, int]:
        """How many requests this replica has answered from folded and from full prompts."""
        return {"folded_prompts": self._folded, "full_prompts": self._full}
