"""Training rows from recorded answers, without a teacher or a run.

Two programs: Banking77, whose prompt names 77 intents (Casanueva et al., 2020), and a short
one that sorts queries into the seven intents of SNIPS (Coucke et al., 2018).
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import dspy

from distill.rows import Row, predictor_prompts, render_rows
from distill.tracing.trace import PredictorCall, Trace, Usage
from examples.banking77.program import build
from examples.banking77.recorded_teacher import read_recording
from serve.folding import Folding

Pair = tuple[str, str]
"""A query and its answer."""

SHORT = dspy.Predict(dspy.Signature("text -> intent", "Name the intent of the query."))


def make_rows(data: Path, *, folded: bool) -> tuple[list[Row], Folding | None]:
    """Rows of all recorded queries of Banking77, in the order of the files."""
    return render(build(), read_recording(data).items(), folded=folded)


def render(
    program: dspy.Predict, pairs: Iterable[Pair], *, folded: bool
) -> tuple[list[Row], Folding | None]:
    """Rows of a program of one input and one output, and how they were folded."""
    rendered, adapter = predictor_prompts(program), dspy.ChatAdapter()
    folding = Folding.learn(rendered, adapter) if folded else None
    (asked,) = program.signature.input_fields
    (answered,) = program.signature.output_fields
    traces = [_trace({asked: text}, {answered: answer}) for text, answer in pairs]
    return render_rows(traces, rendered, adapter, folding)[0], folding


def prompts(data: Path, count: int) -> list[Sequence[dict]]:
    """The first queries of Banking77 as ordinary prompts, as a client sends them."""
    program, adapter = build(), dspy.ChatAdapter()
    texts = list(read_recording(data))[:count]
    return [adapter.format(program.signature, [], {"text": text}) for text in texts]


def banking77(data: Path) -> tuple[list[Pair], list[Pair]]:
    """Training queries with the teacher's answers, test queries with the truth."""
    with (data / "train.csv").open(newline="", encoding="utf-8") as file:
        train = [row["text"] for row in csv.DictReader(file)]
    with (data / "teacher_answers.csv").open(newline="", encoding="utf-8") as file:
        answers = [row["answer"] for row in csv.DictReader(file) if row["split"] == "train"]
    with (data / "test.csv").open(newline="", encoding="utf-8") as file:
        test = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    return list(zip(train, answers, strict=True)), test


def snips(data: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and validation queries with their intents."""
    return (
        [pair for file in sorted(data.glob("train_*_full.json")) for pair in _queries(file)],
        [pair for file in sorted(data.glob("validate_*.json")) for pair in _queries(file)],
    )


def _queries(file: Path) -> list[Pair]:
    # One of the files writes its emoji as two surrogates each.
    text = file.read_bytes().decode("utf-8", "surrogatepass")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    ((intent, queries),) = json.loads(text).items()
    return [("".join(part["text"] for part in query["data"]), intent) for query in queries]


def _trace(inputs: dict[str, str], outputs: dict[str, str]) -> Trace:
    call = PredictorCall("self", inputs, outputs)
    name = json.dumps(inputs)
    return Trace(name, name, (call,), outputs, Usage(), 0.0)
