"""The deployment that holds the student: an engine behind a batcher.

A plain class; ``app`` makes a Ray Serve deployment of it.
"""

from contextlib import ExitStack

from serve.batcher import Batcher
from serve.engines.base import ChatRequest, ChatResult
from serve.files import local_folder


class StudentServer:
    """Answers chat completions, in batches.

    Args:
        student_dir: The student directory; of a remote one, the replica keeps a copy.
        max_batch_size: Most requests generated together.
        num_threads: CPU threads to compute with; None leaves torch's choice.
    """

    def __init__(self, student_dir: str, max_batch_size: int, num_threads: int | None) -> None:
        self._files = ExitStack()
        # Importing torch belongs to the replica, not to whoever builds the application.
        from serve.engines.transformers import TransformersEngine

        folder = self._files.enter_context(local_folder(student_dir))
        self._batcher = Batcher(TransformersEngine(folder, num_threads), max_batch_size)
        self._folded = 0
        self._full = 0

    def __del__(self) -> None:
        # Ray Serve calls it when the replica ends.
        self._files.close()

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Answer one request. See ``Batcher.complete``."""
        result = await self._batcher.complete(request)
        self._folded += result.folded
        self._full += not result.folded
        return result

    async def status(self) -> dict[str, int]:
        """How many requests this replica has answered from folded and from full prompts."""
        return {"folded_prompts": self._folded, "full_prompts": self._full}
