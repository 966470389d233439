"""What programs need of a process to use threads of their own in it.

Asked for by whoever runs programs; it changes the process it is asked for in, and no other.
"""

import contextvars
import functools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tqdm


def allow_threads() -> None:
    """Let programs start threads, pools and ``dspy.Parallel``, several programs at once.

    A thread finds DSPy's settings as they were where it was started, a pool's call as they
    were where it was submitted: the LM, and the example that the call is for. Again does
    nothing more.
    """
    if not isinstance(tqdm.tqdm._instances, _Bars):
        tqdm.tqdm._instances = _Bars()
    if threading.Thread.start is not _start:
        threading.Thread.start = _start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = _submit  # type: ignore[assignment, method-assign]


class _Bars(weakref.WeakSet[Any]):
    """Progress bars, each of which takes itself out at its end.

    ``dspy.Parallel`` empties tqdm's set before it begins, and with it the bars of the other
    threads, which then fail with ``KeyError: <weakref ... to 'tqdm'>``.
    """

    def clear(self) -> None:
        """Leave them in."""


_plain_start: Any = threading.Thread.start
_plain_submit: Any = ThreadPoolExecutor.submit


@functools.wraps(_plain_start)
def _start(self: threading.Thread) -> None:
    context, own = contextvars.copy_context(), vars(self).get("run")

    def run() -> None:
        # Else the thread would hold itself, and with it all that the context holds.
        del self.run
        if own is not None:
            self.run = own  # type: ignore[method-assign]
        context.run(self.run)

    self.run = run  # type: ignore[method-assign]
    _plain_start(self)


@functools.wraps(_plain_submit)
def _submit(self: ThreadPoolExecutor, call: Any, /, *args: Any, **kwargs: Any) -> Any:
    # A pool's threads outlive the call that started them, whose settings are not the next one's.
    return _plain_submit(self, contextvars.copy_context().run, call, *args, **kwargs)
