"""Traces and chats that were recorded elsewhere, as rows beside those of the run.

A file is JSON lines, each ``{"messages": [...]}`` as OpenAI's fine-tuning takes them, or a
trace as ``raydistill traces --export`` writes it; one that was rejected there is passed over.
Every line is checked before the first teacher call; a message of an error names file and line.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import fsspec

from distill.chats import check_chat
from distill.datasets import canonical_json
from distill.fingerprints import fingerprint
from distill.rows import Row, RowCounts, fold_row
from distill.tracing.trace import Trace
from distill.turns import WEIGHT
from serve.errors import ConfigurationError
from serve.folding import Folding


def check(files: Sequence[str]) -> None:
    """See that every line can become rows.

    Raises:
        ConfigurationError: One cannot, or a file cannot be read or holds nothing.
    """
    for file in files:
        if not sum(1 for _ in _records(file)):
            raise ConfigurationError(f"trace.import: {file} holds nothing to learn from.")


def rows(
    files: Sequence[str],
    render: Callable[[Iterable[Trace]], Iterator[Row]],
    counts: RowCounts,
    folding: Folding | None,
) -> Iterator[Row]:
    """The rows of the files, in their order: chats as they are or folded, traces rendered.

    Args:
        files: As ``trace.import`` names them.
        render: Renders traces, and counts their rows.
        counts: Counts all that is imported.
        folding: None leaves the prompts full.

    Raises:
        ConfigurationError: As ``check``.
    """
    for record in itertools.chain.from_iterable(map(_records, files)):
        if isinstance(record, Row):
            found = [counts.counted(fold_row(record, folding) if folding else record)]
        else:
            found = list(render([record]))
        counts.imported += len(found)
        yield from found


def _records(file: str) -> Iterator[Row | Trace]:
    try:
        with fsspec.open(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = _record(f"trace.import: {file}, line {number}", line)
                if record is not None:
                    yield record
    except (OSError, ImportError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"trace.import: {file} cannot be read: {error}") from None


def _record(where: str, line: str) -> Row | Trace | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where}: is not valid JSON: {error}") from None
    if isinstance(record, dict) and "messages" in record:
        return _chat(where, record["messages"])
    if isinstance(record, dict) and "calls" in record:
        try:
            rejected = record.pop("rejected", None)
            trace = Trace.from_json(record)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{where}: is not a trace ({type(error).__name__}: {error}). Expected what "
                "raydistill traces --export writes."
            ) from None
        return None if rejected or trace.failure else trace
    raise ConfigurationError(
        f'{where}: expected {{"messages": [...]}} or a trace, found {line.strip()[:100]}.'
    )


def _chat(where: str, messages: Any) -> Row:
    check_chat(where, messages)
    known = [_known(message) for message in messages]
    return Row(known, "", fingerprint(canonical_json(known)), folded=False)


def _known(message: dict[str, Any]) -> dict[str, Any]:
    """What counts of a message; what else a log says of it, as a name, is not in the prompt."""
    known = {"role": message["role"], "content": message["content"]}
    return known if message.get(WEIGHT) != 0 else {**known, WEIGHT: 0}
