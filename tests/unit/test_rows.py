"""Rows: what is kept, how it is rendered, what is left out and counted."""

from typing import Literal

import dspy
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.rows import check_renderable, predictor_prompts, render_rows
from distill.tracing.trace import PredictorCall, Trace, Usage
from distill.tracing.values import jsonable, revive, revive_prediction
from distill.turns import is_trained
from serve.errors import ConfigurationError
from serve.folding import Folding
from tests import programs

pytestmark = pytest.mark.dspy


def trace(calls=()):
    return Trace("k", "e", tuple(calls), None, Usage(), 0.0)


def judged(text="sun", mood="good"):
    return PredictorCall("judge", {"text": text}, {"mood": mood})


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter()])
def test_a_full_row_is_what_the_adapter_says(adapter):
    program = programs.TwoSteps()
    rows, _ = render_rows([trace([judged()])], predictor_prompts(program), adapter)
    (row,) = rows
    assert row.predictor == "judge"
    assert row.messages[:-1] == adapter.format(program.judge.signature, [], {"text": "sun"})
    assert adapter.parse(program.judge.signature, row.messages[-1]["content"]) == {"mood": "good"}
    assert not row.folded


def test_a_folded_row_unfolds_to_the_full_one():
    program, adapter = programs.TwoSteps(), dspy.ChatAdapter()
    traces = [trace([judged(), PredictorCall("answer", {"text": "a", "mood": "b"}, {"reply": ""})])]
    full, _ = render_rows(traces, predictor_prompts(program), adapter)
    folding = Folding.learn(predictor_prompts(program), adapter)
    folded, counts = render_rows(traces, predictor_prompts(program), adapter, folding)
    assert counts.folded == 2
    for before, after in zip(full, folded, strict=True):
        assert folding.unfold_prompt(after.messages[:-1]) == before.messages[:-1]
        answer = folding.unfold_completion(after.predictor, after.messages[-1]["content"])
        assert answer == before.messages[-1]["content"]
        assert sum(len(m["content"]) for m in after.messages) < 60


def test_calls_that_cannot_teach_are_left_out_and_counted():
    calls = [
        PredictorCall(None, {"text": "a"}, {"mood": "good"}),
        PredictorCall("gone", {"text": "a"}, {"mood": "good"}),
        PredictorCall("judge", {"text": "a"}, {"mood": None}),
        judged(),
    ]
    rows, counts = render_rows(
        [trace(calls)], predictor_prompts(programs.TwoSteps()), dspy.ChatAdapter()
    )
    assert len(rows) == 1
    assert (counts.unknown_predictor, counts.missing_output) == (2, 1)


def test_an_adapter_that_raises_costs_the_row_not_the_run():
    class Fragile(dspy.ChatAdapter):
        def format_assistant_message_content(self, signature, outputs, **kwargs):
            raise KeyError("mood")

    rows, counts = render_rows(
        [trace([judged()])], predictor_prompts(programs.TwoSteps()), Fragile()
    )
    assert rows == []
    assert sum(counts.unrenderable.values()) == 1


def test_an_adapter_that_cannot_write_answers_is_refused_before_any_call():
    class Mute(dspy.ChatAdapter):
        def format_assistant_message_content(self, signature, outputs, **kwargs):
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="Mute cannot write the answers of answer"):
        check_renderable(predictor_prompts(programs.TwoSteps()), Mute())
    assert len(check_renderable(predictor_prompts(programs.TwoSteps()), dspy.ChatAdapter())) == 2


def test_demos_are_part_of_the_prompt_and_fold_away():
    program = programs.TwoSteps()
    program.judge.demos = [dspy.Example(text="fog", mood="bad")]
    full, _ = render_rows([trace([judged()])], predictor_prompts(program), dspy.ChatAdapter())
    assert len(full[0].messages) == 5
    folding = Folding.learn(predictor_prompts(program), dspy.ChatAdapter())
    folded, _ = render_rows(
        [trace([judged()])], predictor_prompts(program), dspy.ChatAdapter(), folding
    )
    assert len(folded[0].messages) == 2


def test_only_the_traced_answer_of_a_row_is_trained_on():
    program = programs.TwoSteps()
    program.judge.demos = [dspy.Example(text="fog", mood="bad")]
    chat = dspy.Signature("text, history: dspy.History -> reply")
    history = {"messages": [{"text": "hi", "reply": "ho"}]}
    talk = PredictorCall("chat", {"text": "and you?", "history": history}, {"reply": "well"})
    prompts = {**predictor_prompts(program), "chat": (chat, [])}
    rows, _ = render_rows([trace([judged(), talk])], prompts, dspy.ChatAdapter())
    for row in rows:
        said = [message for message in row.messages if message["role"] == "assistant"]
        assert len(said) == 2
        assert [is_trained(message) for message in said] == [False, True]
        assert is_trained(row.messages[-1])


class Item(pydantic.BaseModel):
    name: str
    count: int | None


class Typed(dspy.Signature):
    """Typed values."""

    n: int = dspy.InputField()
    items: list[Item] = dspy.OutputField()
    kind: Literal["a", "b"] | None = dspy.OutputField()


@given(st.integers(), st.lists(st.builds(Item, name=st.text(), count=st.none() | st.integers())))
def test_values_survive_json_with_their_types(n, items):
    fields = Typed.output_fields
    values = {"items": items, "kind": None}
    assert revive(jsonable(values), fields) == values
    prediction = revive_prediction(jsonable(values), dspy.Predict(Typed))
    assert dict(prediction.items()) == values
    adapter = dspy.ChatAdapter()
    live = adapter.format_assistant_message_content(Typed, values)
    assert adapter.format_assistant_message_content(Typed, revive(jsonable(values), fields)) == live


def test_a_value_that_does_not_fit_its_type_stays():
    assert revive({"n": "many"}, Typed.input_fields) == {"n": "many"}
