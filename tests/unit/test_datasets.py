"""Data files: every format gives the same examples, and bad files say what is wrong."""

import json

import dspy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import DataConfig
from distill.datasets import count_leaks, distinct, example_id, is_dev, load_examples
from serve.errors import ConfigurationError

pytestmark = pytest.mark.dspy

RECORDS = [{"text": "a\nb", "label": "x"}, {"text": 'q "u"', "label": "ÿ\u2028z"}]


def data(**changes):
    return DataConfig(**{"train": "-", "test": "-", "inputs": ["text"], **changes})


def write(path, records):
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), "utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    examples = load_examples(write(tmp_path / f"d.{suffix}", RECORDS), data())
    assert [example.toDict() for example in examples] == RECORDS
    assert all(example.inputs().keys() == ["text"] for example in examples)


def test_columns_are_renamed_and_the_limit_holds(tmp_path):
    path = write(tmp_path / "d.csv", RECORDS)
    examples = load_examples(path, data(columns={"label": "mood"}, limit=1))
    assert [example.toDict() for example in examples] == [{"text": "a\nb", "mood": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", None, "no such file"),
        ("d.csv", b"", "is empty"),
        ("d.csv", b" \n", "is empty"),
        ("d.csv", b"text,label\n", "holds no examples"),
        ("d.csv", b"\x00\x01\xff", "not UTF-8 text"),
        ("d.csv", b"\xff\xfe1\x001", "not UTF-8 text"),
        ("d.csv", b"text,label\na,b,c\n", "line 2: has 3 columns"),
        ("d.csv", b"text,label\na\n", "line 2: has 1 columns"),
        ("d.csv", b"body,label\na,b\n", "data.inputs names 'text'"),
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("d.jsonl", b"[1]\n", "expected a JSON object"),
        ("d.jsonl", b'{"text": null}\n', "example 1 has no 'text'"),
        ("d.json", b'{"text": "a"}', "JSON list of objects"),
        ("d.json", b"{", "not valid JSON"),
        ("d.parquet", b"PAR1", "not a Parquet file"),
        ("d.xlsx", b"PK", "unknown kind of file"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load_examples(str(path), data())
    assert said in str(caught.value)


def test_a_column_may_have_any_name(tmp_path):
    records = [{"text": "a", "self": "b", "base": "c"}]
    examples = load_examples(write(tmp_path / "d.jsonl", records), data())
    assert [example.toDict() for example in examples] == records


def test_a_rename_of_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="renames 'nope'"):
        load_examples(write(tmp_path / "d.csv", RECORDS), data(columns={"nope": "x"}))


values = st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.booleans(), min_size=1)


@given(values)
def test_an_id_rests_on_content_not_on_order(fields):
    inputs = [next(iter(fields))]
    one = dspy.Example(fields).with_inputs(*inputs)
    other = dspy.Example(dict(reversed(fields.items()))).with_inputs(*inputs)
    assert example_id(one) == example_id(other)
    assert example_id(one) != example_id(dspy.Example(fields, extra_=1).with_inputs(*inputs))


def test_the_split_by_id_takes_about_a_twentieth():
    ids = [example_id(dspy.Example(text=str(n)).with_inputs("text")) for n in range(4000)]
    assert 120 < sum(map(is_dev, ids)) < 280


def test_equal_examples_are_one():
    one, other = (dspy.Example(text=t).with_inputs("text") for t in "ab")
    assert list(distinct([one, other, one]).values()) == [one, other]


def test_leaks_are_found_in_spite_of_case_and_spacing():
    train = [dspy.Example(text="Where is  my card?", y=1).with_inputs("text")]
    test = [
        dspy.Example(text="where is my card?", y=2).with_inputs("text"),
        dspy.Example(text="another", y=1).with_inputs("text"),
    ]
    assert count_leaks(train, test) == 1
