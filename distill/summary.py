"""What the stages say of themselves: a line on the terminal, a section in the report."""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from distill.config import RunConfig
from distill.preflight import Inputs
from distill.progress import ProgressReporter, Stage
from distill.rows import RowCounts
from distill.rundir import RunDir
from distill.selection import SURPLUS, Selection
from distill.tracing.collect import OnProgress
from distill.tracing.limits import Counts
from distill.tracing.trace import Usage, total_usage
from serve.folding import Folding

PACKAGES = ("raydistill", "ray", "dspy", "torch", "transformers", "deepspeed")
TIMES = "times.json"
_WORDS = {SURPLUS: "surplus traces of an example"}


@contextlib.contextmanager
def timed(directory: RunDir, stage: str) -> Iterator[None]:
    """Add to the seconds that a stage has taken, over all the times it was run."""
    start = time.monotonic()
    try:
        yield
    finally:
        times = directory.read_json(TIMES) or {}
        times[stage] = times.get(stage, 0.0) + time.monotonic() - start
        directory.write_json(TIMES, times)


def show_tracing(stage: Stage) -> OnProgress:
    """A callback that shows tracing: failures, calls a second, cost."""
    start = time.monotonic()

    def show(counts: Counts, calls: int, total: int) -> None:
        rate = calls / max(time.monotonic() - start, 1e-9)
        text = f"{counts.finished - counts.failed} ok, {counts.failed} failed"
        if calls:
            text += f", {calls} calls ({rate:.0f}/s)"
        if counts.tokens:
            text += f", {counts.tokens:,} tokens"
        if counts.cost_usd:
            text += f", ${counts.cost_usd:.4f}"
        fields = {"failed": counts.failed, "calls": calls, "tokens": counts.tokens}
        stage.update(counts.finished, total, text, **fields, cost=counts.cost_usd)

    return show


def show_training(stage: Stage, progress: ProgressReporter) -> Callable[[Mapping[str, Any]], None]:
    """A callback that shows the events of training: loss, tokens/s, the last evaluation."""
    evaluated: dict[str, Any] = {}

    def show(event: Mapping[str, Any]) -> None:
        if event["event"] == "train_step":
            text = f"loss {event['loss']:.3f}, {event['tokens_per_s']:.0f} tokens/s"
            if evaluated:
                text += f", {_evaluation_words(evaluated)}"
            stage.update(event["step"], event["num_steps"], text, **_fields(event))
            return
        progress.event(event["event"], **_fields(event))
        if event["event"] == "train_eval" and event["val_loss"] is not None:
            evaluated.update(event)
        if event["event"] == "train_stop":
            progress.note(
                f"  Training ends after step {event['step']} of {event['num_steps']}: none of the "
                f"last {event['evaluations_since_best']} evaluations was better."
            )

    return show


def _evaluation_words(found: Mapping[str, Any]) -> str:
    return f"validation {found['val_loss']:.3f}, {found['val_exact']:.1%} exact"


def describe_inputs(inputs: Inputs) -> str:
    """The checked inputs in a line."""
    counts = f"{len(inputs.train)} train, {len(inputs.dev)} dev, {len(inputs.test)} test examples"
    unfoldable = inputs.folding.unfoldable if inputs.folding else {}
    return "; ".join(
        [counts, *(f"prompts of {name} stay full ({why})" for name, why in unfoldable.items())]
    )


def describe_rows(counts: RowCounts, selection: Selection) -> str:
    """The rows in a line, with what was left out and why."""
    parts = [f"{counts.folded + counts.full} rows, {counts.folded} folded"]
    parts += [f"{counts.imported} imported"] if counts.imported else []
    parts += [f"{selection.hinted} traces with a hint"] if selection.hinted else []
    return ", ".join([*parts, *describe_left_out(counts, selection.rejections())])


def describe_left_out(counts: RowCounts, rejected: Mapping[str, int]) -> list[str]:
    """What did not become rows, and why."""
    left_out = {
        **{_WORDS.get(why, f"rejected by {why}"): count for why, count in rejected.items()},
        "calls of no known predictor": counts.unknown_predictor,
        "calls without an output": counts.missing_output,
        "calls that cannot be rendered": sum(counts.unrenderable.values()),
    }
    return [f"{count} {what}" for what, count in left_out.items() if count]


def describe_training(result: Any) -> str:
    """The training in a line."""
    parts = [f"{result.num_parameters / 1e6:.1f} M parameters", f"{result.steps} steps"]
    parts.append(f"train loss {result.train_loss:.3f}")
    if result.val_loss is not None:
        parts.append(f"validation loss {result.val_loss:.3f}")
        parts.append(f"{result.val_exact:.1%} exact (epoch {result.best_epoch})")
    if result.dropped_rows:
        parts.append(f"{result.dropped_rows} rows over train.max_length left out")
    if result.cut_rows:
        parts.append(f"{result.cut_rows} rows cut to train.max_length")
    return ", ".join(parts)


def describe_choice(result: Any) -> str:
    """What the program scored with each checkpoint, in a line."""
    scores = ", ".join(f"{each.metric:.3f} (step {each.step})" for each in result.candidates)
    return f"Metric on the dev set: {scores}; the first is the student."


def no_rows(selection: Selection) -> str:
    """The message of a run that has nothing to learn from."""
    reasons = ", ".join(f"{n} by {reason}" for reason, n in selection.rejections().items() if n)
    example = "".join(
        f" The most common error: {error}." for error, _ in selection.errors.most_common(1)
    )
    return (
        f"None of {selection.traces} traces is good enough to learn from; rejected: "
        f"{reasons or 'none, but no call could be rendered'}.{example} Look at the metric (or set "
        "trace.keep=all) and run it again; traces are kept."
    )


def tracing_section(
    directory: RunDir, selection: Selection, usages: Mapping[str, Usage]
) -> dict[str, Any]:
    """The report's ``tracing``; ``usages`` by predictor."""
    usage = total_usage(list(usages.values()))
    return {
        "examples": selection.examples,
        "traces": selection.traces,
        "kept": selection.kept,
        "hinted": selection.hinted,
        "rejected": selection.rejections(),
        "teacher_calls": usage.calls,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost_usd": usage.cost_usd,
        "by_predictor": {name: dataclasses.asdict(each) for name, each in usages.items()},
        "seconds": (directory.read_json(TIMES) or {}).get("trace"),
    }


def folding_section(folding: Folding | None, counts: RowCounts) -> dict[str, Any] | None:
    """The report's ``folding``; None where prompts are full."""
    if folding is None:
        return None
    unfoldable = dict(folding.unfoldable)
    return {"rows_folded": counts.folded, "rows_full": counts.full, "unfoldable": unfoldable}


def run_section(directory: RunDir, config: RunConfig) -> dict[str, Any]:
    """The report's ``run``: what was run, when, and by which versions."""
    return {
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "directory": directory.uri,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def versions(*others: str) -> dict[str, str]:
    """The versions of the packages that a student depends on.

    Args:
        others: Packages that not every student does.
    """
    return {name: importlib.metadata.version(name) for name in (*PACKAGES, *others)}


def training_section(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The report's ``training``."""
    return {key: value for key, value in (result or {}).items() if key != "model_dir"}


def _fields(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "event"}
