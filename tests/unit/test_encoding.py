"""Which tokens of a conversation are trained on, and what becomes of long ones."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.training.encoding import LongCounts, encode
from serve.engines.prompts import encode_prompt
from serve.errors import ConfigurationError
from serve.models import CHAT_TEMPLATE

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = TURNS + PROMPT
TRIMMED = TURNS.replace("m.content", "m.content | trim") + PROMPT
# As templates of reasoning models do, it shows no thoughts of the turns before the last question.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>{% endfor %}" + PROMPT
)
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}</call>{% endfor %}{{ m.content or '' }}<|end|>{% endfor %}"
    + PROMPT
)


def make_tokenizer(template, merges=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, *(a + b for a, b in merges)]
    vocabulary = {sign: i for i, sign in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def parts_of(rows):
    """Each sequence as a list of (token ids, is completion)."""
    found = []
    for start, stop in itertools.pairwise(rows.offsets):
        tokens = zip(rows.input_ids[start:stop].tolist(), rows.completion[start:stop], strict=True)
        groups = itertools.groupby(tokens, key=lambda token: bool(token[1]))
        found.append([([token for token, _ in group], kind) for kind, group in groups])
    return found


def sequences(rows, tokenizer):
    """Each sequence as a list of (text, is completion)."""
    return [[(tokenizer.decode(ids), kind) for ids, kind in parts] for parts in parts_of(rows)]


def trained(messages, template=PLAIN, **options):
    tokenizer = make_tokenizer(template)
    rows, _ = encode([messages], tokenizer, options.pop("max_length", 500), **options)
    return [
        [text for text, is_completion in parts if is_completion]
        for parts in sequences(rows, tokenizer)
    ]


TALK = [user("a"), assistant("b"), user("c"), assistant("d")]


def test_every_turn_of_the_assistant_is_trained_on():
    assert trained(TALK) == [["b<|end|>", "d<|end|>"]]
    assert trained(TALK, CHAT_TEMPLATE) == [["b<|end|>", "d<|end|>"]]


def test_a_turn_of_weight_0_is_not():
    shown = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    assert trained(shown) == [["d<|end|>"]]
    assert trained([user("a"), assistant("b"), user("c"), assistant("d", weight=0)]) == [
        ["b<|end|>"]
    ]


def test_the_weight_is_not_shown_to_the_template():
    template = "{% for m in messages %}{{ m | length }}{{ m.content }}<|end|>{% endfor %}"
    tokenizer = make_tokenizer(template)
    rows, _ = encode([[user("a"), assistant("b", weight=0), *TALK[2:]]], tokenizer, 500)
    assert tokenizer.decode(rows.input_ids) == "2a<|end|>2b<|end|>2c<|end|>d<|end|>"


def test_what_opens_a_conversation_is_not_trained_on():
    assert trained([assistant("hello"), *TALK]) == [["b<|end|>", "d<|end|>"]]


def test_a_turn_that_the_template_changes_later_has_a_sequence_of_its_own():
    talk = [user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")]
    tokenizer = make_tokenizer(FORGETFUL)
    rows, _ = encode([talk], tokenizer, 500)
    assert sequences(rows, tokenizer) == [
        [("<user>a<|end|><assistant>", False), ("<think>x</think>b<|end|>", True)],
        [
            ("<user>a<|end|><assistant>b<|end|><user>c<|end|><assistant>", False),
            ("<think>y</think>d<|end|>", True),
        ],
    ]


def test_a_turn_that_the_template_trims_later_has_a_sequence_of_its_own():
    talk = [user("a"), assistant(" b "), user("c"), assistant("d"), user("e"), assistant("f")]
    assert trained(talk, TRIMMED) == [[" b <|end|>"], ["d<|end|>", "f<|end|>"]]


def test_a_token_across_the_start_of_an_answer_gives_each_turn_its_own_sequence():
    tokenizer = make_tokenizer(PLAIN, merges=[(">", "b")])
    rows, _ = encode([TALK], tokenizer, 500)
    assert [
        [text for text, is_completion in parts if is_completion]
        for parts in sequences(rows, tokenizer)
    ] == [["b<|end|>"], ["d<|end|>"]]
    # The first turn's prompt is as the engine has it.
    prompt = encode_prompt(tokenizer, TALK[:1])
    assert rows.input_ids[: len(prompt)].tolist() == prompt


def test_a_tool_call_is_trained_on_as_the_template_writes_it():
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    talk = [
        user("a"),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "content": "t"},
        assistant("d"),
    ]
    assert trained(talk, CALLS) == [["<call>look</call><|end|>", "d<|end|>"]]


def test_a_tool_call_that_the_template_does_not_end_is_refused():
    template = CALLS.replace("<|end|>", "{% if not m.tool_calls %}<|end|>{% endif %}")
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    with pytest.raises(ConfigurationError, match="tool call"):
        trained([user("a"), assistant("", tool_calls=[call])], template)


def test_a_tool_call_that_the_template_leaves_out_is_refused():
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    with pytest.raises(ConfigurationError, match="does not write a tool call"):
        trained([user("a"), assistant("", tool_calls=[call])], PLAIN)


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


@pytest.mark.parametrize(
    ("messages", "template", "said"),
    [
        ([user("a"), user("a"), assistant("b")], ALTERNATING, "roles must alternate"),
        ([user("a"), {"role": "assistant", "tool_calls": [CALL]}], CHAT_TEMPLATE, "template"),
        ([user("a"), {"role": "tool"}, assistant("b")], CHAT_TEMPLATE, "template"),
        ([user([{"type": "text"}]), assistant("b")], CHAT_TEMPLATE, "TypeError"),
        ([user("a"), assistant([{"type": "text"}])], PLAIN, "has to be text, found list"),
        ([user("a"), assistant(None)], PLAIN, "has to be text, found NoneType"),
        ([user("a"), {"role": "assistant"}], PLAIN, "has to be text, found NoneType"),
        ([assistant("b")], PLAIN, "nothing asks for it"),
        ([assistant("b"), user("a"), assistant("c", weight=0)], PLAIN, "nothing asks for it"),
        ([user("\ud800"), assistant("b")], PLAIN, "tokenizer does not take it"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused_by_its_number(messages, template, said):
    tokenizer = make_tokenizer(template)
    good = [user("a"), assistant("b")]
    with pytest.raises(ConfigurationError, match=f"^val row 3: .*{said}"):
        encode([good, good, messages], tokenizer, 500, where="val row")


texts = st.text(st.sampled_from("ab <>|\n é"), max_size=6)


@given(st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4), st.data())
def test_what_is_trained_is_what_inference_sees(turns, data):
    template = data.draw(st.sampled_from([PLAIN, TRIMMED, FORGETFUL]))
    merges = data.draw(st.sampled_from([[], [(">", "b"), ("a", "b")]]))
    tokenizer = make_tokenizer(template, merges)
    talk = [
        message
        for asked, said, counts in turns
        for message in (user(asked), assistant(said, weight=int(counts)))
    ]
    rows, _ = encode([talk], tokenizer, 10_000)
    expected = []
    for index, message in enumerate(talk):
        if message.get("weight") == 1:
            seen = [{key: m[key] for key in ("role", "content")} for m in talk[:index]]
            prompt = tokenizer.apply_chat_template(seen, add_generation_prompt=True)["input_ids"]
            expected.append((prompt, message["content"] + "<|end|>"))
    found = []
    for parts in parts_of(rows):
        before = []
        for ids, is_completion in parts:
            if is_completion:
                found.append((before, tokenizer.decode(ids)))
            before = before + ids
    assert sorted(found) == sorted(expected)


LONG = [user("x" * 10), assistant("y" * 10)]  # <user>x...<|end|><assistant> has 28 tokens


@pytest.mark.parametrize(
    ("policy", "max_length", "kept", "counts"),
    [
        ("drop", 39, ["y" * 10 + "<|end|>"], LongCounts()),
        ("drop", 38, None, LongCounts(dropped=1)),
        ("keep_start", 38, ["y" * 10], LongCounts(cut=1)),
        ("keep_start", 28, None, LongCounts(dropped=1)),
        ("keep_start", 29, ["y"], LongCounts(cut=1)),
        ("keep_end", 38, ["y" * 10 + "<|end|>"], LongCounts(cut=1)),
        ("keep_end", 2, ["y<|end|>"], LongCounts(cut=1)),
        ("keep_end", 1, None, LongCounts(dropped=1)),
    ],
)
def test_a_long_row_is_dropped_or_cut_as_asked_and_counted(policy, max_length, kept, counts):
    tokenizer = make_tokenizer(PLAIN)
    rows, found = encode([LONG], tokenizer, max_length, policy)
    assert found == counts
    assert (rows.lengths <= max_length).all()
    texts = [[t for t, c in parts if c] for parts in sequences(rows, tokenizer)]
    assert texts == ([kept] if kept else [])


def test_the_longest_completion_is_that_of_one_turn():
    rows, _ = encode([TALK, [user("a"), assistant("four")]], make_tokenizer(PLAIN), 500)
    assert rows.longest_completion == 5
    assert encode([], make_tokenizer(PLAIN), 500)[0].longest_completion == 0
