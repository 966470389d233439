"""Folding loses nothing: what it folds it unfolds exactly, and it folds every real row."""

import json
from typing import Any, Literal

import dspy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import StudentError
from serve.folding import ESCAPE, SEPARATOR, Folding

pytestmark = pytest.mark.dspy


class Person(pydantic.BaseModel):
    name: str
    age: int


class Triage(dspy.Signature):
    """Route a support ticket."""

    subject: str = dspy.InputField()
    lines: list[str] = dspy.InputField()
    team: Literal["billing", "tech"] = dspy.OutputField()
    note: str = dspy.OutputField(desc="one sentence")


class Extract(dspy.Signature):
    """Extract what the ticket holds."""

    text: str = dspy.InputField()
    urgent: bool = dspy.OutputField()
    count: int = dspy.OutputField()
    people: list[Person] = dspy.OutputField()
    owner: Person = dspy.OutputField()
    tags: list[str] = dspy.OutputField()


class PlainAdapter(dspy.ChatAdapter):
    """A user's own layout: no system message, trimmed at both ends."""

    def format(self, signature, demos, inputs):
        lines = [f"{name}: {inputs[name]}" for name in signature.input_fields]
        return [{"role": "user", "content": "\n".join(lines).strip()}]

    def format_assistant_message_content(self, signature, outputs, missing_field_message=None):
        return "; ".join(f"{name}={outputs[name]}" for name in signature.output_fields).strip()


ADAPTERS = [dspy.ChatAdapter(), dspy.XMLAdapter(), PlainAdapter(), dspy.JSONAdapter()]
DEMO = {"subject": "it ¦ broke", "lines": ["a", "b"], "team": "tech", "note": "[[ ## note ## ]]"}
PREDICTORS = {"triage": (Triage, [DEMO]), "extract¦1": (Extract, [])}

nasty = st.sampled_from(
    [SEPARATOR, ESCAPE, ESCAPE + "0", "[[ ## note ## ]]\n", "[[ ## completed ## ]]", "</note>"]
) | st.sampled_from(["\n\n", " ", '"', "\\", "{", "triage", "\r\n", "<tags />"])
# NUL marks message boundaries; a text that holds it is left unfolded.
character = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
texts = st.lists(st.one_of(nasty, st.text(character, max_size=8)), max_size=6).map("".join)
people = st.builds(Person, name=texts, age=st.integers())
triage_values = st.fixed_dictionaries(
    {
        "subject": texts,
        "lines": st.lists(texts, max_size=3),
        "team": st.sampled_from(["billing", "tech"]),
        "note": texts,
    }
)
extract_values = st.fixed_dictionaries(
    {
        "text": texts,
        "urgent": st.booleans(),
        "count": st.integers(),
        "people": st.lists(people, max_size=2),
        "owner": people,
        "tags": st.lists(texts, max_size=3),
    }
)


def render(adapter: Any, signature: Any, demos: list, values: dict[str, Any]) -> list[dict]:
    inputs = {name: values[name] for name in signature.input_fields}
    outputs = {name: values[name] for name in signature.output_fields}
    completion = adapter.format_assistant_message_content(signature, outputs)
    messages = adapter.format(signature, demos, inputs)
    return [*messages, {"role": "assistant", "content": completion}]


def unfold(folding: Folding, predictor: str, messages: list[dict]) -> list[dict]:
    completion = folding.unfold_completion(predictor, messages[-1]["content"])
    return [*folding.unfold_prompt(messages[:-1]), {"role": "assistant", "content": completion}]


FOLDINGS = [
    Folding.from_json(json.loads(json.dumps(Folding.learn(PREDICTORS, adapter).to_json())))
    for adapter in ADAPTERS
]
each_adapter = pytest.mark.parametrize(
    ("adapter", "folding"),
    list(zip(ADAPTERS, FOLDINGS, strict=True)),
    ids=[type(adapter).__name__ for adapter in ADAPTERS],
)


@each_adapter
def test_every_predictor_is_learned(adapter, folding):
    assert folding.unfoldable == {}
    assert list(folding.prompts) == list(PREDICTORS)


@each_adapter
@settings(max_examples=120, deadline=None)
@given(values=triage_values)
def test_rows_of_text_fold_and_unfold_to_themselves(adapter, folding, values):
    row = render(adapter, *PREDICTORS["triage"], values)
    folded = folding.fold_row(row)
    assert folded is not None
    assert folded.predictor == "triage"
    assert unfold(folding, folded.predictor, folded.messages) == row


@each_adapter
@settings(max_examples=120, deadline=None)
@given(values=extract_values)
def test_rows_of_typed_values_fold_and_unfold_to_themselves(adapter, folding, values):
    row = render(adapter, *PREDICTORS["extract¦1"], values)
    folded = folding.fold_row(row)
    assert folded is not None
    assert folded.predictor == "extract¦1"
    assert unfold(folding, folded.predictor, folded.messages) == row


@each_adapter
@settings(max_examples=80, deadline=None)
@given(data=st.data(), text=texts)
def test_texts_that_resemble_a_row_unfold_exactly_or_are_left_alone(adapter, folding, data, text):
    row = render(adapter, *PREDICTORS["triage"], data.draw(triage_values))
    message = data.draw(st.sampled_from(row))
    at = data.draw(st.integers(0, len(message["content"])))
    message["content"] = message["content"][:at] + text + message["content"][at:][1:]
    folded = folding.fold_row(row)
    assert folded is None or unfold(folding, folded.predictor, folded.messages) == row


message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"])},
    optional={"content": st.one_of(st.text(), st.none(), st.just([])), "name": st.text()},
)


@each_adapter
@given(messages=st.lists(message, max_size=4))
def test_arbitrary_messages_unfold_exactly_or_are_left_alone(adapter, folding, messages):
    folded = folding.fold_prompt(messages)
    assert folded is None or folding.unfold_prompt(folded.messages) == messages


@each_adapter
@given(text=st.one_of(texts, st.text()))
def test_arbitrary_completions_unfold_exactly_or_are_left_alone(adapter, folding, text):
    for predictor in PREDICTORS:
        folded = folding.fold_completion(predictor, text)
        assert folded is None or folding.unfold_completion(predictor, folded) == text


def test_finetune_data_folds_to_the_tag_and_the_values():
    adapter = dspy.ChatAdapter()
    folding = Folding.learn({"self": (dspy.Signature("question -> answer"), [])}, adapter)
    row = adapter.format_finetune_data(
        dspy.Signature("question -> answer"), [], {"question": "why?"}, {"answer": "so"}
    )["messages"]
    folded = folding.fold_row(row)
    assert folded is not None
    assert folded.messages == [
        {"role": "user", "content": "self¦why?"},
        {"role": "assistant", "content": "so"},
    ]
    assert unfold(folding, "self", folded.messages) == row


def test_a_conversation_of_another_length_is_left_alone():
    folding = FOLDINGS[0]
    row = render(ADAPTERS[0], *PREDICTORS["triage"], DEMO)
    assert folding.fold_row(row) is not None
    assert folding.fold_row([*row[:-1], row[1], row[-1]]) is None
    assert folding.fold_prompt(row) is None
    assert folding.fold_row(row[:-1]) is None


def test_the_first_of_two_predictors_with_one_prompt_wins():
    signature = dspy.Signature("question -> answer")
    adapter = dspy.ChatAdapter()
    folding = Folding.learn({"a": (signature, []), "b": (signature, [])}, adapter)
    folded = folding.fold_prompt(adapter.format(signature, [], {"question": "q"}))
    assert folded is not None
    assert folded.predictor == "a"


def test_a_completion_with_the_wrong_number_of_values_is_refused():
    assert FOLDINGS[0].unfold_completion("triage", "billing") is None
    assert FOLDINGS[0].unfold_completion("triage", "billing¦x¦y") is None
    assert FOLDINGS[0].unfold_completion("unknown", "billing¦x") is None


def test_messages_that_were_never_folded_do_not_unfold():
    with pytest.raises(ValueError, match="not a folded prompt"):
        FOLDINGS[0].unfold_prompt([{"role": "user", "content": "hello"}])


class Chat(dspy.Signature):
    history: dspy.History = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Look(dspy.Signature):
    images: list[dspy.Image] = dspy.InputField()
    answer: str = dspy.OutputField()


class Doubling(dspy.ChatAdapter):
    def format(self, signature, demos, inputs):
        return super().format(signature, demos, inputs) * 2


@pytest.mark.parametrize(
    ("signature", "adapter", "reason"),
    [
        (Chat, dspy.ChatAdapter(), "dspy.History"),
        (Look, dspy.ChatAdapter(), "dspy.Image"),
        (Triage, Doubling(), "2 times"),
        (Triage, object(), "format"),
    ],
)
def test_a_predictor_that_cannot_be_folded_is_recorded_with_the_reason(signature, adapter, reason):
    folding = Folding.learn({"p": (signature, [])}, adapter)
    assert reason in folding.unfoldable["p"]
    assert folding.fold_prompt([{"role": "user", "content": "x"}]) is None


def test_damaged_json_is_a_student_error():
    with pytest.raises(StudentError, match="damaged"):
        Folding.from_json({"predictors": {"p": {}}})
