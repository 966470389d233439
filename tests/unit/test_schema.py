"""The forms of /predict have the program's names and types."""

from typing import Annotated, Any, Literal

import dspy
import pydantic
import pytest

from serve.schema import input_form, output_form, to_json

pytestmark = pytest.mark.dspy


class Item(pydantic.BaseModel):
    name: str
    count: int = 1


class Order(dspy.Signature):
    """Read an order."""

    text: str = dspy.InputField(desc="the order")
    limit: int = dspy.InputField()
    items: list[Item] = dspy.OutputField(desc="what was ordered")
    kind: Literal["new", "change"] = dspy.OutputField()
    values: str = dspy.OutputField()


class Unhinted(dspy.Module):
    def __init__(self):
        super().__init__()
        self.read = dspy.Predict(Order)

    def forward(self, text, limit=3):
        return self.read(text=text, limit=limit)


class Hinted(Unhinted):
    def forward(self, text: Annotated[str, pydantic.Field(min_length=1)], limit: float, note: Item):
        return self.read(text=text, limit=limit)


class Opaque:
    """A class that has no JSON form."""


class Odd(Unhinted):
    def forward(self, text: "Missing", limit: Opaque, extra):  # noqa: F821
        return self.read(text=text, limit=limit)


def schema_of(form) -> dict[str, Any]:
    return form.model_json_schema()


def test_types_and_descriptions_come_from_the_signature():
    schema = schema_of(input_form(Unhinted(), ["text", "limit"]))
    assert schema["properties"]["text"] == {
        "title": "text",
        "type": "string",
        "description": "the order",
    }
    assert schema["properties"]["limit"]["type"] == "integer"
    assert "description" not in schema["properties"]["limit"]


def test_an_input_with_a_default_may_be_left_out():
    form = input_form(Unhinted(), ["text", "limit"])
    assert schema_of(form)["required"] == ["text"]
    assert form.model_validate({"text": "two pens"}).values() == {"text": "two pens", "limit": 3}


def test_what_forward_declares_wins_over_the_signature():
    form = input_form(Hinted(), ["text", "limit", "note"])
    values = form.model_validate({"text": "a", "limit": 0.5, "note": {"name": "x"}}).values()
    assert values == {"text": "a", "limit": 0.5, "note": Item(name="x")}


def test_hints_that_cannot_be_read_fall_back():
    form = input_form(Odd(), ["text", "limit", "extra"])
    assert form.model_validate({"text": "a", "limit": 1, "extra": [1]}).values()["extra"] == [1]


def test_an_unknown_or_missing_or_wrong_input_is_named():
    form = input_form(Unhinted(), ["text", "limit"])
    with pytest.raises(pydantic.ValidationError) as caught:
        form.model_validate({"limit": "many", "texts": "a"})
    assert {error["loc"] for error in caught.value.errors()} == {("text",), ("limit",), ("texts",)}


def test_outputs_are_typed_whatever_they_are_called():
    properties = schema_of(output_form(Unhinted(), ["items", "kind", "values", "extra"]))[
        "properties"
    ]
    assert properties["items"]["type"] == "array"
    assert properties["kind"]["enum"] == ["new", "change"]
    assert properties["values"]["type"] == "string"
    assert properties["extra"] == {"title": "extra"}


def test_a_bare_predictor_is_a_program_too():
    form = input_form(dspy.Predict(Order), ["text", "limit"])
    assert form.model_validate({"text": "a", "limit": 1}).values() == {"text": "a", "limit": 1}


def test_values_become_json():
    value = {"items": [Item(name="pen")], "odd": Opaque}
    assert to_json(value)["items"] == [{"name": "pen", "count": 1}]
    assert "Opaque" in to_json(value)["odd"]
