"""Which conversations from outside can become rows."""

import pytest

from distill.chats import check_chat
from distill.provider import TrainingRows
from serve.errors import ConfigurationError

ASKED = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
FOUND = {"role": "tool", "content": "12"}


@pytest.mark.parametrize(
    "messages",
    [
        [ASKED, SAID],
        [SAID, ASKED, SAID],
        [ASKED, {**SAID, "weight": 0.0}, ASKED, {**SAID, "weight": 1}],
        [ASKED, CALL, FOUND, SAID],
        [ASKED, {"role": "assistant", "tool_calls": [{}]}],
    ],
)
def test_what_the_provider_takes(messages):
    (row,) = TrainingRows.read([{"messages": messages}]).train
    assert row.messages == messages


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("ab", "a list of at least one message"),
        ([ASKED], "the last message must be"),
        ([ASKED, {**SAID, "content": " "}], "not be empty"),
        ([SAID], "nothing asks for it"),
        ([SAID, ASKED, {**SAID, "weight": 0}], "nothing asks for it"),
        ([ASKED, {**SAID, "weight": 0}], "weight 0"),
        ([ASKED, {**SAID, "weight": "0"}], r"messages\[1\]\.weight: expected 0 or 1, found '0'"),
        ([ASKED, {**SAID, "content": None}], r"messages\[1\]\.content: expected text"),
        ([ASKED, {**SAID, "content": [{"type": "text"}]}], "found list"),
        ([ASKED, {"role": "assistant"}], r"messages\[1\]\.content"),
        ([ASKED, CALL, {"role": "tool"}, SAID], r"messages\[2\]\.content"),
        ([{**ASKED, "tool_calls": [{}]}, SAID], r"messages\[0\]\.tool_calls"),
        ([ASKED, {**SAID, "content": "\ud800"}], "half of a surrogate pair"),
        ([{"content": "a"}, SAID], r"messages\[0\]: expected a role of .*tool, found None"),
        ([None, SAID], r"messages\[0\]: expected a role"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_its_row(messages, said):
    rows = [{"messages": [ASKED, SAID]}, {"messages": messages}]
    with pytest.raises(ConfigurationError, match=rf"^train_data\[1\]: .*{said}"):
        TrainingRows.read(rows)


@pytest.mark.parametrize("row", ["ab", {"prompt": "a"}, None])
def test_a_row_without_messages_is_refused(row):
    with pytest.raises(ConfigurationError, match=r"^train_data\[0\]: expected"):
        TrainingRows.read([row])


def test_tools_are_for_those_who_say_so():
    check_chat("here", [ASKED, CALL, FOUND, SAID], tools=True)
    with pytest.raises(ConfigurationError, match=r"messages\[1\]\.tool_calls"):
        check_chat("here", [ASKED, CALL, FOUND, SAID])
