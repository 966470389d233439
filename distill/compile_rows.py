"""A compile's traces become training data, one set of rows for each fine-tuning.

Which rows there are, and in which order, is decided here; rendering one is ``rows``, folding
them is the provider's.
"""

import functools
import random
from collections.abc import Mapping, Sequence

from distill import export, imports, summary
from distill.compile_plan import Group, Plan
from distill.datasets import example_id, is_dev
from distill.programs import hook_path, import_path, program_fingerprint
from distill.provider import TrainingRows
from distill.rows import Row, RowCounts, predictor_prompts, stream_rows
from distill.selection import Selection
from distill.tracing.trace import Trace
from serve.errors import TracingError

Traces = Mapping[str, Sequence[Trace]]
"""A teacher's traces of each example, by its id."""

HOLD_BACK_FROM = 100
"""Examples. Of fewer, each is worth more in the training than the few would say."""


def make_training_rows(
    plan: Plan, group: Group, found: Sequence[Traces]
) -> tuple[TrainingRows, str]:
    """The rows that a group learns from, and a line about them.

    Args:
        plan: The compile.
        group: The fine-tuning.
        found: The traces of each teacher.

    Raises:
        TracingError: There are none.
    """
    train_ids, val_ids = _split(plan)
    selection = Selection(plan.trace, plan.has_metric)
    train, counts = _render(plan, group, found, train_ids, selection)
    val, _ = _render(plan, group, found, val_ids, selection)
    render = functools.partial(
        stream_rows, prompts=group.prompts, adapter=group.adapter, counts=counts
    )
    train += imports.rows(plan.trace.imports, render, counts, folding=None)
    if not train:
        raise TracingError(_nothing(group, selection))
    if len(group.prompts) < len(plan.keys):
        counts.unknown_predictor = 0  # They are what other groups learn from.
    left_out = summary.describe_left_out(counts, selection.rejections())
    text = f"{len(train)} rows, {len(val)} to validate on"
    if counts.imported:
        left_out = [f"{counts.imported} imported", *left_out]
    rows = TrainingRows(train, val, _profile(plan, group, list(selection.outputs)))
    return rows, ", ".join([text, *left_out])


def _split(plan: Plan) -> tuple[list[str], list[str]]:
    """The ids of the examples to train on, and of those to validate on, in their order."""
    ids = [example_id(example) for example in plan.trainset]
    if plan.valset:
        return ids, [example_id(example) for example in plan.valset]
    if plan.strict_compat or len(set(ids)) < HOLD_BACK_FROM:
        return ids, []
    return [name for name in ids if not is_dev(name)], [name for name in ids if is_dev(name)]


def _render(
    plan: Plan, group: Group, found: Sequence[Traces], ids: Sequence[str], selection: Selection
) -> tuple[list[Row], RowCounts]:
    """The rows of these examples, shuffled as DSPy shuffles them."""
    rows: list[Row] = []
    counts = RowCounts()
    for teacher, traces in zip(plan.teachers, found, strict=True):
        prompts = group.prompts
        if plan.strict_compat:
            shown = predictor_prompts(teacher.task.program, plan.exclude_demos)
            prompts = {name: shown[name] for name in group.prompts}
        chosen = [
            trace for name in ids if name in traces for trace in selection.choose_runs(traces[name])
        ]
        rows += stream_rows(chosen, prompts, group.adapter, counts)
    random.Random(0).shuffle(rows)
    return rows, counts


def _profile(plan: Plan, group: Group, outputs: Sequence[str]) -> export.Profile:
    about = {}
    program = plan.student.program
    state = export.program_state(program, plan.exclude_demos) if len(plan.groups) == 1 else None
    path = import_path(program) if state else None
    setup = plan.student.setup
    hook = hook_path(setup) if setup else None
    if path and (hook or not setup):
        # One student for the whole program can be served as the program.
        about = {
            "state": state,
            "program_path": path,
            "setup": hook,
            "fingerprint": program_fingerprint(plan.student),
            "inputs": list(plan.trainset[0].inputs().keys()),
            "outputs": outputs,
        }
    return export.make_profile(group.prompts, group.adapter, group.folding, **about)


def _nothing(group: Group, selection: Selection) -> str:
    if not selection.kept:
        return summary.no_rows(selection)
    return (
        f"Nothing to train {', '.join(group.prompts)} on: {selection.kept} of {selection.traces} "
        "traces are good enough to learn from, and none holds a complete call of it. Give examples "
        "for which the program calls it, or train one student for all predictors with "
        "multitask=True. Traces are kept; the next compile goes on from them."
    )
