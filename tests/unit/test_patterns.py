"""Patterns of folded completions: what DSPy can parse passes, and nothing else of a closed set."""

import enum
import re
from typing import Any, Literal

import dspy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.folding import SEPARATOR, Folding
from serve.patterns import ANYTHING, INTEGER, NUMBER, completion_pattern

pytestmark = pytest.mark.dspy


class Colour(enum.Enum):
    RED = "red (dark)"
    BLUE = "blue.*"


class Owner(pydantic.BaseModel):
    name: str


class Everything(dspy.Signature):
    """All closed sets, and open fields."""

    text: str = dspy.InputField()
    kind: Literal["a|b", "c¦d", "e f-g"] = dspy.OutputField()
    colour: Colour = dspy.OutputField()
    sure: bool = dspy.OutputField()
    count: int = dspy.OutputField()
    share: float = dspy.OutputField()
    words: list[str] = dspy.OutputField()
    owner: Owner = dspy.OutputField()
    reason: str = dspy.OutputField()


class LinesAdapter(dspy.ChatAdapter):
    """A user's own: one line for each value, in a fixed order, and yes or no."""

    def format_assistant_message_content(self, signature, outputs, missing_field_message=None):
        said = {True: "yes", False: "no"}
        lines = (said[v] if isinstance(v, bool) else v for v in outputs.values())
        return "\n".join(f"- {line}" for line in lines)

    def parse(self, signature, completion):
        values = [line.removeprefix("- ") for line in completion.splitlines()]
        fields = dict(zip(signature.output_fields, values, strict=True))
        said = {"yes": True, "no": False}
        return {k: said.get(v, v) for k, v in fields.items()}


class SilentAdapter(dspy.ChatAdapter):
    """Writes what it cannot read."""

    def parse(self, signature, completion):
        raise KeyError(completion)


ADAPTERS = [dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter()]
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)


def pattern_of(signature: Any, adapter: Any) -> tuple[Folding, str]:
    folding = Folding.learn({"p": (signature, [])}, adapter)
    return folding, completion_pattern(signature, adapter, folding, "p")


LEARNED = {type(adapter): pattern_of(Everything, adapter) for adapter in ADAPTERS}
texts = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@each_adapter
@settings(max_examples=100, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["a|b", "c¦d", "e f-g"]),
            "colour": st.sampled_from(Colour),
            "sure": st.booleans(),
            "count": st.integers(-(10**17), 10**17),
            "share": st.floats(allow_nan=False, allow_infinity=False),
            "words": st.lists(texts),
            "owner": st.builds(Owner, name=texts),
            "reason": texts,
        }
    )
)
def test_whatever_an_adapter_writes_is_in_the_pattern(adapter, values):
    folding, pattern = LEARNED[type(adapter)]
    folded = folding.fold_completion(
        "p", adapter.format_assistant_message_content(Everything, values)
    )
    assert folded is not None
    assert re.fullmatch(pattern, folded)


@pytest.mark.parametrize(
    ("adapter", "kind", "sure"),
    [
        (dspy.ChatAdapter(), "{}", ("True", "False")),
        (dspy.XMLAdapter(), "{}", ("True", "False")),
        (dspy.JSONAdapter(), '"{}"', ("true", "false")),
    ],
    ids=["ChatAdapter", "XMLAdapter", "JSONAdapter"],
)
def test_closed_fields_are_held_to_their_values_as_the_adapter_writes_them(adapter, kind, sure):
    _, pattern = LEARNED[type(adapter)]
    fields = pattern.split(SEPARATOR)
    for value in ("a|b", "e f-g"):
        assert re.fullmatch(fields[0], kind.format(value))
    assert not re.fullmatch(fields[0], kind.format("another"))
    assert re.fullmatch(fields[1], kind.format("red (dark)"))
    assert not re.fullmatch(fields[1], kind.format("RED"))
    assert fields[2] == f"({sure[0]}|{sure[1]})"
    assert fields[3:5] == [f"({INTEGER})", f"({NUMBER})"]
    assert pattern.endswith(f"¦({ANYTHING})" * 3)


@each_adapter
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_an_answer_of_closed_fields_under_the_pattern_parses(adapter, data):
    closed = Everything.delete("words").delete("owner").delete("reason")
    folding, pattern = pattern_of(closed, adapter)
    folded = data.draw(st.from_regex(pattern, fullmatch=True))
    adapter.parse(closed, folding.unfold_completion("p", folded))


def test_numbers_of_a_closed_set_are_values_as_well():
    signature = dspy.Signature("text -> x").with_updated_fields("x", type_=Literal[1, 2])
    assert pattern_of(signature, dspy.JSONAdapter())[1] == "(1|2)"


def test_an_adapter_of_the_users_own_says_how_values_look():
    signature = dspy.Signature("text -> sure: bool, note")
    folding, pattern = pattern_of(signature, LinesAdapter())
    assert pattern == f"(yes|no)¦({ANYTHING})"
    assert folding.unfold_completion("p", "yes¦so") == "- yes\n- so"


def test_what_an_adapter_does_not_read_back_stays_open():
    signature = dspy.Signature("text -> sure: bool, count: int")
    assert pattern_of(signature, SilentAdapter())[1] == f"({ANYTHING})¦({ANYTHING})"
    # Two values that look the same cannot both be read back.
    doubled = dspy.Signature("text -> x").with_updated_fields("x", type_=Literal[1, "1"])
    assert pattern_of(doubled, dspy.ChatAdapter())[1] == f"({ANYTHING})"


@pytest.mark.parametrize(
    "folded",
    [
        "a¦red (dark)¦True¦1¦1.0¦[]¦{}¦x",
        "a|b¦red (dark)¦yes¦1¦1.0¦[]¦{}¦x",
        "a|b¦red dark¦True¦1¦1.0¦[]¦{}¦x",
        "a|b¦red (dark)¦True¦one¦1.0¦[]¦{}¦x",
        "a|b¦red (dark)¦True¦1¦1.0¦[]¦{}",
        "a|b¦red (dark)¦True¦1¦1.0¦[]¦{}¦x¦y",
    ],
)
def test_a_value_outside_its_set_or_a_wrong_number_of_values_is_not(folded):
    assert not re.fullmatch(LEARNED[dspy.ChatAdapter][1], folded)
