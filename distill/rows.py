"""Traces become rows: one training conversation for each predictor call.

Pure: rendered through the program's own adapter, then folded where folding is on and
matches. Which traces become rows is decided in ``selection``.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import dspy

from distill.tracing.trace import PredictorCall, Trace
from distill.tracing.values import revive
from distill.turns import as_input, plain
from serve.errors import ConfigurationError
from serve.folding import Folding

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Prompts = Mapping[str, tuple[type[dspy.Signature], Sequence[Any]]]
"""The signature and the demos of predictors, by their names."""


@dataclass(frozen=True)
class Row:
    """One training conversation; the last message is the assistant's.

    What the assistant says in it is learned, except in messages of weight 0; see ``turns``.
    """

    messages: Sequence[Mapping[str, Any]]
    predictor: str
    example_id: str
    folded: bool

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in a rows file."""
        return asdict(self)


@dataclass
class RowCounts:
    """What became of the calls: rows, folded or full, or nothing and why."""

    folded: int = 0
    full: int = 0
    imported: int = 0
    """Of these."""
    unknown_predictor: int = 0
    missing_output: int = 0
    unrenderable: Counter[str] = field(default_factory=Counter)

    def counted(self, row: Row) -> Row:
        """The row, counted."""
        if row.folded:
            self.folded += 1
        else:
            self.full += 1
        return row


def predictor_prompts(program: dspy.Module, exclude_demos: bool = False) -> Prompts:
    """What each of a program's predictors puts into its prompts, by the predictor's name."""
    return {
        name: (predictor.signature, [] if exclude_demos else predictor.demos)
        for name, predictor in program.named_predictors()
    }


def check_renderable(prompts: Prompts, adapter: dspy.Adapter) -> list[Messages]:
    """See that the adapter can render every predictor's prompts and answers.

    Returns:
        Each predictor's prompt with empty values; those of fields that have no empty value,
        as a conversation's history, are left out.

    Raises:
        ConfigurationError: The adapter does not render answers.
    """
    rendered = []
    for name, (signature, demos) in prompts.items():
        try:
            adapter.format_assistant_message_content(
                signature, dict.fromkeys(signature.output_fields, "")
            )
        except NotImplementedError:
            raise ConfigurationError(
                f"{type(adapter).__name__} cannot write the answers of {name}, so there would be "
                "nothing to train on. Use dspy.ChatAdapter, or an adapter that can."
            ) from None
        try:
            blank = dict.fromkeys(signature.input_fields, "")
            rendered.append(adapter.format(signature, demos, blank))
        # Which types refuse an empty value, and how, is up to each of them.
        except Exception as error:
            logger.info("The prompt of %s cannot be rendered empty: %s", name, error)
    return rendered


def render_rows(
    traces: Iterable[Trace],
    prompts: Prompts,
    adapter: dspy.Adapter,
    folding: Folding | None = None,
) -> tuple[list[Row], RowCounts]:
    """All rows at once, and what was counted; see ``stream_rows``."""
    counts = RowCounts()
    return list(stream_rows(traces, prompts, adapter, counts, folding)), counts


def stream_rows(
    traces: Iterable[Trace],
    prompts: Prompts,
    adapter: dspy.Adapter,
    counts: RowCounts,
    folding: Folding | None = None,
) -> Iterator[Row]:
    """One row for each predictor call, in order.

    Args:
        traces: The traces to learn from.
        prompts: The predictors whose calls are rendered, and how.
        adapter: Renders prompts and answers.
        counts: Counts what becomes of the calls.
        folding: None leaves the prompts full.
    """
    for trace in traces:
        for call in trace.calls:
            prompt = prompts.get(call.predictor or "")
            if prompt is None:
                counts.unknown_predictor += 1
            elif row := _render(call, *prompt, adapter, trace.example_id, counts):
                yield counts.counted(fold_row(row, folding) if folding else row)


def fold_row(row: Row, folding: Folding) -> Row:
    """The row without its scaffold; as it is where it does not match."""
    *prompt, answer = row.messages
    folded = folding.fold_row([*plain(prompt), answer])
    return replace(row, messages=folded.messages, folded=True) if folded else row


def _render(
    call: PredictorCall,
    signature: type[dspy.Signature],
    demos: Sequence[Any],
    adapter: dspy.Adapter,
    example_id: str,
    counts: RowCounts,
) -> Row | None:
    inputs = revive(call.inputs, signature.input_fields)
    outputs = revive(call.outputs, signature.output_fields)
    try:
        prompt = adapter.format(signature, list(demos), inputs)
        answer = adapter.format_assistant_message_content(signature, outputs)
        answer.encode()  # Half of a surrogate pair is no text that a tokenizer takes.
    # Adapters are the user's to write, and one value of a field type may be what breaks
    # one; the row is left out, counted and shown.
    except Exception as error:
        counts.unrenderable[f"{type(error).__name__}: {error}"] += 1
        logger.warning("A call of %s cannot be rendered: %s", call.predictor, error)
        return None
    if _says_none(call, answer, signature, adapter):
        counts.missing_output += 1
        return None
    # What the assistant says in a prompt, in demos or a history, is no answer of the teacher's.
    messages = [*as_input(prompt), {"role": "assistant", "content": answer}]
    return Row(messages, call.predictor or "", example_id, folded=False)


def _says_none(
    call: PredictorCall, answer: str, signature: type[dspy.Signature], adapter: dspy.Adapter
) -> bool:
    """Whether an output is None and the answer has a text for it, which would be learned."""
    empty = [name for name in signature.output_fields if call.outputs.get(name) is None]
    if not empty:
        return False
    try:
        read: dict[str, Any] = adapter.parse(signature, answer)
    # What cannot be read back is no None either; each adapter raises what it likes.
    except Exception as error:
        logger.debug("An answer of %s without %s does not parse: %s", call.predictor, empty, error)
        return True
    return any(read.get(name) is not None for name in empty)
