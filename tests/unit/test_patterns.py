"""Patterns of folded completions: what DSPy can parse passes, and nothing else of a closed set."""

import enum
import re
from typing import Literal

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.folding import Folding
from serve.patterns import completion_pattern
from serve.programs import describe_signature


class Colour(enum.Enum):
    RED = "red (dark)"
    BLUE = "blue.*"


class Everything(dspy.Signature):
    """All closed sets, and an open field."""

    text: str = dspy.InputField()
    kind: Literal["a|b", "c¦d", "e f-g"] = dspy.OutputField()
    colour: Colour = dspy.OutputField()
    sure: bool = dspy.OutputField()
    count: int = dspy.OutputField()
    share: float = dspy.OutputField()
    words: list[str] = dspy.OutputField()
    reason: str = dspy.OutputField()


PATTERN = re.compile(completion_pattern(describe_signature(Everything)["outputs"]))
FOLDING = Folding.learn({"p": (Everything, [])}, dspy.ChatAdapter())


@given(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["a|b", "c¦d", "e f-g"]),
            "colour": st.sampled_from(Colour),
            "sure": st.booleans(),
            "count": st.integers(-(10**17), 10**17),
            "share": st.floats(-1e9, 1e9).filter(lambda x: "inf" not in str(x)),
            "words": st.lists(st.text()),
            "reason": st.text(alphabet=st.characters(exclude_characters="\0")),
        }
    )
)
def test_whatever_dspy_writes_is_in_the_pattern(values):
    text = dspy.ChatAdapter().format_assistant_message_content(Everything, values)
    folded = FOLDING.fold_completion("p", text)
    assert folded is not None
    assert PATTERN.fullmatch(folded)


@pytest.mark.parametrize(
    "folded",
    [
        "a¦red (dark)¦True¦1¦1.0¦[]¦x",
        "a|b¦red (dark)¦yes¦1¦1.0¦[]¦x",
        "a|b¦red dark¦True¦1¦1.0¦[]¦x",
        "a|b¦red (dark)¦True¦one¦1.0¦[]¦x",
        "a|b¦red (dark)¦True¦1¦1.0¦[]",
        "a|b¦red (dark)¦True¦1¦1.0¦[]¦x¦y",
    ],
)
def test_a_value_outside_its_set_or_a_wrong_number_of_values_is_not(folded):
    assert not PATTERN.fullmatch(folded)
