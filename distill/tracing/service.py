"""A model that has to be served on the cluster before an LM can ask it.

Owns that it runs while it is needed, and what is said meanwhile. How it is served is
``serve.temporary``; when it is needed is for ``collect`` and ``collection``.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from distill.tracing.actor import LmSpec
from serve.cluster import capacity

SAY_AFTER_S = 60.0
MAX_QUEUED_REQUESTS = 100_000
"""Of an actor; how many there are is for the actors' concurrency to say."""


@dataclass(frozen=True)
class Service:
    """A model and its replicas.

    Attributes:
        model: Its full name.
        lm: What LMs that ask it have for a model.
        num_replicas: How many there are.
        say: Tells a person.
    """

    model: str
    lm: str
    num_replicas: int
    say: Callable[[str], None]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have the model answer until the end of the block; begins once it does.

        Raises:
            StudentError: It does not come to answer.
        """
        from serve.deployments import Scale
        from serve.temporary import served

        scale = Scale(
            min_replicas=self.num_replicas,
            max_replicas=self.num_replicas,
            max_queued_requests=MAX_QUEUED_REQUESTS,
            use_gpu=_has_gpus(),
        )
        self.say(f"  Starting {self.model} on Ray Serve ...")
        slow = threading.Timer(
            SAY_AFTER_S,
            self.say,
            [f"  {self.model} is not up yet: it is large, or the cluster has no room to spare."],
        )
        slow.daemon = True
        slow.start()
        start = time.monotonic()
        try:
            with served(self.model, scale):
                slow.cancel()
                self.say(f"  {self.model} answers after {time.monotonic() - start:.0f} s.")
                yield
        finally:
            slow.cancel()

    def beside(self, lm: LmSpec) -> LmSpec:
        """An LM whose actors leave the model its GPUs; without any left, they do without."""
        free = capacity("GPU") - self.num_replicas * _has_gpus()
        return replace(lm, num_gpus=0) if free < lm.num_gpus else lm


def _has_gpus() -> bool:
    return capacity("GPU") >= 1
