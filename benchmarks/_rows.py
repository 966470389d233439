"""Training rows of Banking77 from recorded answers, without a teacher or a run."""

from collections.abc import Sequence
from pathlib import Path

import dspy

from distill.rows import Row, predictor_prompts, render_rows
from distill.tracing.trace import PredictorCall, Trace, Usage
from examples.banking77.program import build
from examples.banking77.recorded_teacher import read_recording
from serve.folding import Folding


def make_rows(data: Path, *, folded: bool) -> tuple[list[Row], Folding | None]:
    """Rows of all recorded queries, in the order of the files, and how they were folded."""
    rendered, adapter = predictor_prompts(build()), dspy.ChatAdapter()
    folding = Folding.learn(rendered, adapter) if folded else None
    traces = [_trace(text, answer) for text, answer in read_recording(data).items()]
    return render_rows(traces, rendered, adapter, folding)[0], folding


def prompts(data: Path, count: int) -> list[Sequence[dict]]:
    """The first queries as ordinary prompts, as a client sends them."""
    program, adapter = build(), dspy.ChatAdapter()
    texts = list(read_recording(data))[:count]
    return [adapter.format(program.signature, [], {"text": text}) for text in texts]


def _trace(text: str, answer: str) -> Trace:
    call = PredictorCall("self", {"text": text}, {"category": answer})
    return Trace(text, text, (call,), {"category": answer}, Usage(), 0.0)
