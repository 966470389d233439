"""Examples from files: csv, jsonl, json, parquet, by path or URI, or ``hf:<dataset>[:<split>]``.

Owns reading, renaming, choosing inputs, example ids and the split of a validation set.
An example is a ``dspy.Example`` with its inputs set; its id is a hash of its content, so
it is the same in every run, on every machine and in any order.
"""

import csv
import hashlib
import io
import itertools
import json
import typing
from collections.abc import Iterable, Iterator, Sequence

import dspy
import fsspec

from distill.config import DataConfig
from serve.errors import ConfigurationError

DEV_FRACTION = 0.05
Record = dict[str, typing.Any]


def load_examples(source: str, data: DataConfig) -> list[dspy.Example]:
    """Read one data file.

    Args:
        source: Path, URI or ``hf:<dataset>[:<split>]``.
        data: Names the inputs, the renames and the limit.

    Raises:
        ConfigurationError: The file is missing, empty, of an unknown kind, malformed, or
            lacks a column that the configuration names.
    """
    records = list(itertools.islice(_read(source), data.limit))
    if not records:
        raise ConfigurationError(f"{source}: holds no examples.")
    _check_columns(source, records[0], data)
    return [_to_example(source, number, record, data) for number, record in enumerate(records, 1)]


def example_id(example: dspy.Example) -> str:
    """A stable id: the hash of the example's fields and of which are inputs."""
    content = {"fields": example.toDict(), "inputs": sorted(example.inputs().keys())}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:24]


def canonical_json(value: typing.Any) -> str:
    """One text for equal values, whatever the order of their keys and elements."""
    return json.dumps(value, sort_keys=True, default=_jsonable)


def _jsonable(value: typing.Any) -> typing.Any:
    # Sets have another order in each process.
    if isinstance(value, set | frozenset):
        return sorted(canonical_json(item) for item in value)
    return str(value)


def is_dev(identity: str) -> bool:
    """Whether the split by id puts this example into the validation set."""
    # Decided by the id alone: adding data never moves an example across the split.
    return int(identity[:12], 16) < DEV_FRACTION * 16**12


def count_leaks(train: Iterable[dspy.Example], test: Iterable[dspy.Example]) -> int:
    """Test examples whose inputs, up to case and spacing, are in the trainset as well."""

    def normalised(example: dspy.Example) -> str:
        return " ".join(canonical_json(example.inputs().toDict()).casefold().split())

    seen = {normalised(example) for example in train}
    return sum(normalised(example) in seen for example in test)


def _read(source: str) -> Iterator[Record]:
    if source.startswith("hf:"):
        return _read_hub(source)
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}
    kind = source.rsplit(".", 1)[-1].lower()
    if kind not in readers:
        raise ConfigurationError(
            f"{source}: unknown kind of file; expected one of .{', .'.join(readers)}."
        )
    return readers[kind](source, _read_bytes(source))


def _read_bytes(source: str) -> bytes:
    try:
        with fsspec.open(source, "rb") as file:
            content: bytes = file.read()
    except FileNotFoundError:
        raise ConfigurationError(f"{source}: no such file.") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{source}: is a directory; expected a data file.") from None
    except (OSError, ImportError, ValueError) as error:
        raise ConfigurationError(f"{source}: cannot be read: {error}") from None
    if not content.strip():
        raise ConfigurationError(f"{source}: is empty.")
    return content


def _text(source: str, content: bytes) -> str:
    if b"\x00" not in content:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    raise ConfigurationError(f"{source}: is not UTF-8 text; is it really this kind of file?")


def _read_csv(source: str, content: bytes) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(_text(source, content), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ConfigurationError(
                    f"{source}, line {reader.line_num}: has {_width(row)} columns; "
                    f"the header has {len(reader.fieldnames or ())}."
                )
            yield dict(row)
    except csv.Error as error:
        raise ConfigurationError(f"{source}, line {reader.line_num}: {error}") from None


def _width(row: dict[typing.Any, typing.Any]) -> int:
    extra = row.get(None) or []
    return sum(value is not None for key, value in row.items() if key is not None) + len(extra)


def _read_jsonl(source: str, content: bytes) -> Iterator[Record]:
    # Not splitlines(): JSON strings may hold U+2028 and other line ends of Unicode.
    for number, line in enumerate(_text(source, content).split("\n"), 1):
        if line.strip():
            yield _object(f"{source}, line {number}", line)


def _read_json(source: str, content: bytes) -> Iterator[Record]:
    try:
        values = json.loads(_text(source, content))
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{source}: is not valid JSON: {error}") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ConfigurationError(f"{source}: expected a JSON list of objects, one per example.")
    yield from values


def _object(where: str, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def _read_parquet(source: str, content: bytes) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigurationError(f"{source}: is not a Parquet file: {error}") from None
    yield from table.to_pylist()


def _read_hub(source: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise ConfigurationError(
            f"{source}: needs the Hugging Face datasets package: pip install 'raydistill[hub]'."
        ) from None
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(f"{source}: cannot be loaded: {error}") from None


def _check_columns(source: str, record: Record, data: DataConfig) -> None:
    found = ", ".join(map(str, record))
    for column in data.columns:
        if column not in record:
            raise ConfigurationError(
                f"{source}: data.columns renames {column!r}; the columns are {found}."
            )
    renamed = {data.columns.get(column, column) for column in record}
    for name in data.inputs:
        if name not in renamed:
            raise ConfigurationError(
                f"{source}: data.inputs names {name!r}; the columns are {found}. "
                "Correct data.inputs, or rename a column with data.columns."
            )


def _to_example(source: str, number: int, record: Record, data: DataConfig) -> dspy.Example:
    fields = {data.columns.get(column, column): value for column, value in record.items()}
    missing = [name for name in data.inputs if fields.get(name) is None]
    if missing:
        raise ConfigurationError(f"{source}: example {number} has no {missing[0]!r}.")
    # As one dictionary: a column may be called "self" or "base".
    return dspy.Example(fields).with_inputs(*data.inputs)


def distinct(examples: Sequence[dspy.Example]) -> dict[str, dspy.Example]:
    """Examples by id; of equal ones, the first."""
    by_id: dict[str, dspy.Example] = {}
    for example in examples:
        by_id.setdefault(example_id(example), example)
    return by_id
