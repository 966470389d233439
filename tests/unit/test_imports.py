"""What was recorded elsewhere: it becomes rows, or is refused by file and line."""

import functools
import json

import dspy
import pytest

from distill import imports
from distill.rows import Row, RowCounts, predictor_prompts, stream_rows
from distill.tracing.trace import Failure, FailureKind, PredictorCall, Trace, Usage
from serve.errors import ConfigurationError
from serve.folding import Folding
from tests import programs

PROMPTS, ADAPTER = predictor_prompts(programs.TwoSteps()), dspy.ChatAdapter()
ASKED = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "hello"}


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def rows(files, folding=None):
    counts = RowCounts()
    render = functools.partial(
        stream_rows, prompts=PROMPTS, adapter=ADAPTER, counts=counts, folding=folding
    )
    return list(imports.rows(files, render, counts, folding)), counts


def trace(**changes):
    call = PredictorCall("judge", {"text": "sun"}, {"mood": "good"})
    return Trace("k", "e", (call,), {"mood": "good"}, Usage(), 0.0, **changes).to_json()


def test_a_chat_log_becomes_rows_of_its_messages(tmp_path):
    asked = [{"role": "user", "content": "hi", "name": "ann"}, {**SAID, "weight": 1}]
    file = write(
        tmp_path / "a.jsonl", {"messages": asked, "id": 7}, "", {"messages": [ASKED, SAID]}
    )
    imports.check([file])
    (first, _), counts = rows([file])
    assert first.messages == [{"role": "user", "content": "hi"}, SAID]
    assert (counts.imported, counts.full) == (2, 2)


def test_a_weight_of_0_is_kept_and_another_is_wrong(tmp_path):
    asked = [{"role": "user", "content": "hi"}, {**SAID, "weight": 0}, {**SAID, "weight": 1}]
    (row,), _ = rows([write(tmp_path / "a.jsonl", {"messages": asked})])
    assert row.messages == [*asked[:2], SAID]
    for messages, error in (
        ([ASKED, {**SAID, "weight": 0}], "every message of the assistant has weight 0"),
        ([ASKED, {**SAID, "weight": 0.5}], r"messages\[1\]\.weight: expected 0 or 1, found 0\.5"),
    ):
        with pytest.raises(ConfigurationError, match=error):
            imports.check([write(tmp_path / "b.jsonl", {"messages": messages})])


def test_a_chat_that_is_a_predictors_prompt_is_folded(tmp_path):
    prompt = ADAPTER.format(PROMPTS["judge"][0], [], {"text": "sun"})
    answer = ADAPTER.format_assistant_message_content(PROMPTS["judge"][0], {"mood": "good"})
    chat = {"messages": [*prompt, {"role": "assistant", "content": answer}]}
    (row,), _ = rows([write(tmp_path / "a.jsonl", chat)], Folding.learn(PROMPTS, ADAPTER))
    assert row.folded


def test_exported_traces_become_rows_and_rejected_ones_do_not(tmp_path):
    failed = trace(failure=Failure(FailureKind.PROGRAM, "ValueError", "boom"))
    rejected = {**trace(), "rejected": "metric"}
    file = write(tmp_path / "a.jsonl", {**trace(), "rejected": None}, failed, rejected)
    imports.check([file])
    (row,), counts = rows([file])
    assert isinstance(row, Row)
    assert row.predictor == "judge"
    assert counts.imported == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "or a trace"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "what the assistant says"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "not be empty"),
        ({"messages": [{"role": "tool", "content": "x"}, SAID]}, r"messages\[0\]: expected a role"),
        ({"messages": [{"role": "user", "content": [{}]}, SAID]}, r"messages\[0\].content"),
        ({"messages": ["hi"]}, r"messages\[0\]"),
        ({"messages": [SAID]}, "nothing asks for it"),
        ({"messages": [ASKED, {**SAID, "tool_calls": [{}]}]}, r"messages\[1\].tool_calls"),
        ({"calls": []}, "is not a trace"),
    ],
)
def test_what_cannot_be_a_row_is_refused_by_file_and_line(tmp_path, line, said):
    file = write(tmp_path / "log.jsonl", {"messages": [ASKED, SAID]}, line)
    with pytest.raises(ConfigurationError, match=rf"log\.jsonl, line 2: .*{said}"):
        imports.check([file])


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("none", "empty", "binary"):
        with pytest.raises(ConfigurationError, match=name):
            imports.check([str(tmp_path / name)])
