"""The numbers of report.json: what the arms scored, how they compare, where they differ.

An arm is a program with one LM: teacher, base or student. Owns how results of single
examples become the report's dictionary, in which a number that is not known is null.
How sure a number is, is for ``statistics``; how a report looks, for ``render``; running
the arms, for ``evaluate``.
"""

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

from distill.evaluation.render import render_html, render_terminal
from distill.evaluation.statistics import is_binary, mean_score, paired_difference, percentile

__all__ = [
    "ExampleResult",
    "build_report",
    "compare",
    "disagreements",
    "render_html",
    "render_terminal",
    "summarise_arm",
]

ARMS = ("teacher", "base", "student")
_MAX_TEXT = 300  # characters of a value shown among the disagreements

_TRACING_KEYS = (
    "examples",
    "kept",
    "rejected",
    "teacher_calls",
    "prompt_tokens",
    "completion_tokens",
    "cost_usd",
    "by_predictor",
    "seconds",
)
_TRAINING_KEYS = ("rows", "tokens", "steps", "seconds", "train_loss", "val_loss", "val_exact")
_REJECTED_KEYS = ("metric", "parse", "error")
_FOLDING_KEYS = ("rows_folded", "rows_full")


@dataclass(frozen=True)
class ExampleResult:
    """One arm's answer to one held-out example.

    Attributes:
        score: What the metric gave, a finite number; None without a metric.
        status: ``parse`` if the reply could not be read, ``error`` if there was none.
        prompt_tokens: Over all calls that the program made for this example; so too
            ``completion_tokens``, ``latency_ms`` and ``cost_usd``. None is not known.
        expected: The example's labels.
        prediction: The program's outputs; None where it failed.
    """

    example_id: str
    score: float | None
    status: Literal["ok", "parse", "error"]
    latency_ms: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    inputs: Mapping[str, Any]
    expected: Mapping[str, Any]
    prediction: Mapping[str, Any] | None


Results = Sequence[ExampleResult]
Pairs = list[tuple[ExampleResult, ExampleResult]]


def build_report(
    *,
    arms: Mapping[str, Results | None],
    tracing: Mapping[str, Any],
    training: Mapping[str, Any],
    leakage: Mapping[str, Any],
    run: Mapping[str, Any],
    folding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that report.json holds, as plain JSON values.

    Args:
        arms: Results of ``teacher``, ``base`` and ``student``; None or absent: not run.
        tracing, training, leakage: The keys of report.json; those absent become null,
            further ones are kept. ``training["history"]`` lists the epochs, each with
            ``epoch``, ``train_loss``, ``val_loss``, ``seconds``, ``tokens_per_s``.
        run: ``name``, ``created`` (ISO time), ``directory``, ``command`` (the command
            line that makes this run), ``versions`` (package -> version), ``config``.
        folding: ``rows_folded`` and ``rows_full``; None: folding is off.
    """
    present = {name: arms.get(name) for name in ARMS}
    student, teacher = present["student"] or [], present["teacher"] or []
    results = [result for arm in present.values() for result in arm or []]
    has_metric = _has_metric(results)
    report = {
        "arms": {
            name: None if arm is None else summarise_arm(arm, has_metric=has_metric)
            for name, arm in present.items()
        },
        "comparison": compare(student, teacher),
        "tracing": dict.fromkeys(_TRACING_KEYS)
        | dict(tracing)
        | {"rejected": dict.fromkeys(_REJECTED_KEYS) | dict(tracing.get("rejected") or {})},
        "training": dict.fromkeys(_TRAINING_KEYS) | dict(training),
        "leakage": {"test_in_train": None} | dict(leakage),
        "score_kind": _score_kind(results),
        "disagreements": disagreements(student, teacher),
        "folding": None if folding is None else dict.fromkeys(_FOLDING_KEYS) | dict(folding),
        "run": dict(run),
    }
    # JSON has no NaN: a loss that overflowed is a number that is not known.
    return json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)


def summarise_arm(results: Results, *, has_metric: bool | None = None) -> dict[str, Any]:
    """An arm of report.json.

    An example that failed scores 0. Latency, tokens and cost are over the examples that
    were answered and for which they are known; ``prompt_tokens`` is the mean per example.

    Args:
        results: One per example.
        has_metric: Whether scores were given; None: judged from these results.
    """
    if has_metric is None:
        has_metric = _has_metric(results)
    mean = mean_score(_scores(results)) if has_metric else None
    answered = [result for result in results if result.status != "error"]
    latencies = [r.latency_ms for r in answered if r.latency_ms is not None]
    tokens = [r.prompt_tokens for r in answered if r.prompt_tokens is not None]
    costs = [r.cost_usd for r in answered if r.cost_usd is not None]
    return {
        "score": mean.value if mean else None,
        "ci95": list(mean.ci95) if mean and mean.ci95 else None,
        "n": len(results),
        "parse_failures": sum(result.status == "parse" for result in results),
        "errors": sum(result.status == "error" for result in results),
        "latency_ms": {"p50": percentile(latencies, 50), "p95": percentile(latencies, 95)},
        "prompt_tokens": sum(tokens) / len(tokens) if tokens else None,
        "usd_per_1k": 1000 * sum(costs) / len(costs) if costs else None,
    }


def compare(student: Results, teacher: Results) -> dict[str, Any]:
    """The comparison of report.json, over the examples that both arms have."""
    pairs = _pairs(student, teacher)
    difference = None
    if _has_metric([*student, *teacher]):
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        difference = paired_difference(_scores(ours), _scores(theirs))
    return {
        "student_minus_teacher": {
            "delta": difference.delta if difference else None,
            "ci95": list(difference.ci95) if difference and difference.ci95 else None,
            "p_value": difference.p_value if difference else None,
        }
    }


def disagreements(student: Results, teacher: Results, limit: int = 12) -> dict[str, Any]:
    """Where the arms differ: in score, or in what they predict if there is no metric.

    Returns:
        ``pairs``: examples that both have; ``differ``: how many of them; ``teacher_better``
        and ``student_better``: of those, None without a metric; ``examples``: up to
        ``limit`` to look at, the largest differences of either direction in turn.
    """
    pairs = _pairs(student, teacher)
    if not _has_metric([*student, *teacher]):
        differ = [pair for pair in pairs if _answer(pair[0]) != _answer(pair[1])]
        better: dict[str, int | None] = {"teacher_better": None, "student_better": None}
    else:
        teacher_better = _by_difference(pairs, direction=-1)
        student_better = _by_difference(pairs, direction=1)
        turns = chain.from_iterable(zip_longest(teacher_better, student_better))
        differ = [pair for pair in turns if pair is not None]
        better = {"teacher_better": len(teacher_better), "student_better": len(student_better)}
    return {
        "pairs": len(pairs),
        "differ": len(differ),
        **better,
        "examples": [_shown(*pair) for pair in differ[:limit]],
    }


def _has_metric(results: Results) -> bool:
    return any(result.score is not None for result in results)


def _score(result: ExampleResult) -> float:
    return 0.0 if result.status != "ok" or result.score is None else float(result.score)


def _scores(results: Results) -> list[float]:
    return [_score(result) for result in results]


def _score_kind(results: Results) -> Literal["binary", "graded"] | None:
    if not _has_metric(results):
        return None
    return "binary" if is_binary(_scores(results)) else "graded"


def _pairs(student: Results, teacher: Results) -> Pairs:
    """Both answers to each example; of an example that occurs twice, first with first."""
    waiting: defaultdict[str, deque[ExampleResult]] = defaultdict(deque)
    for result in teacher:
        waiting[result.example_id].append(result)
    return [
        (result, waiting[result.example_id].popleft())
        for result in student
        if waiting[result.example_id]
    ]


def _by_difference(pairs: Pairs, direction: int) -> Pairs:
    def gain(pair: tuple[ExampleResult, ExampleResult]) -> float:
        return direction * (_score(pair[0]) - _score(pair[1]))

    return sorted((pair for pair in pairs if gain(pair) > 0), key=gain, reverse=True)


def _answer(result: ExampleResult) -> dict[str, Any] | None:
    """What counts as the answer: the labelled outputs where there are labels."""
    if result.prediction is None:
        return None
    names = [name for name in result.expected if name in result.prediction]
    return {name: result.prediction[name] for name in names or result.prediction}


def _shown(student: ExampleResult, teacher: ExampleResult) -> dict[str, Any]:
    def side(result: ExampleResult) -> dict[str, Any]:
        answer = _answer(result)
        return {
            "status": result.status,
            "score": result.score if result.score is None else _score(result),
            "prediction": None if answer is None else _texts(answer),
        }

    return {
        "example_id": student.example_id,
        "inputs": _texts(student.inputs),
        "expected": _texts(student.expected),
        "teacher": side(teacher),
        "student": side(student),
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, default=str)
        return value if len(value) <= _MAX_TEXT else value[: _MAX_TEXT - 1] + "…"

    return {name: text(value) for name, value in values.items()}
