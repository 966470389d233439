"""How a report looks: the page to send to a colleague, and the table in the terminal.

Owns the layout of figures; the markup is in ``report.html.j2``, the words and number
formats in ``wording``, the numbers in ``report``. A report without the keys that
report.json need not have still renders.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.evaluation import wording

Report = Mapping[str, Any]

_RUN_KEYS = ("name", "created", "directory", "command", "versions", "config")

_SCORE_LABELS = {"binary": "Right answers", "graded": "Mean score", None: "Score"}


def render_html(report: Report) -> str:
    """One self-contained page: no scripts, nothing loaded from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    run = dict.fromkeys(_RUN_KEYS) | dict(report.get("run") or {})
    arms = {name: arm for name, arm in report["arms"].items() if arm}
    return environment.get_template("report.html.j2").render(
        words=wording,
        arms=arms,
        arm_rows=_arm_rows(arms, report.get("score_kind")),
        tracing=report["tracing"],
        training=report["training"],
        leaked=report["leakage"]["test_in_train"],
        kind=report.get("score_kind"),
        differ=report.get("disagreements") or {"pairs": 0},
        folding=report.get("folding"),
        run=run,
        headline=_unbroken(wording.headline(report)),
        comparison=_unbroken(wording.comparison_words(report)),
        axis=score_axis(list(arms.values()), binary=report.get("score_kind") == "binary"),
        curve=loss_curve(report["training"]),
        serve_commands=_serve_commands(run),
        config=_config_text(run.get("config")),
    )


def render_terminal(report: Report) -> RenderableType:
    """A short table of the arms, and what it says in a few lines."""
    kind = report.get("score_kind")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for title in ("score", "95 % interval", "parse failures", "p50 latency", "prompt tokens"):
        table.add_column(title, justify="right")
    for name, arm in report["arms"].items():
        if arm:
            table.add_row(
                name,
                wording.score(arm["score"], kind),
                wording.interval(arm["ci95"], kind),
                wording.count(arm["parse_failures"]),
                wording.milliseconds(arm["latency_ms"]["p50"]),
                wording.quantity(arm["prompt_tokens"]),
            )
    lines = [Text(line) for line in wording.headline(report)]
    if report["leakage"]["test_in_train"]:
        lines.append(Text(wording.leak_words(report["leakage"]["test_in_train"]), style="yellow"))
    return Group(table, Text(), *lines)


def score_axis(arms: Sequence[Mapping[str, Any]], binary: bool) -> dict[str, Any] | None:
    """A common axis for the arms' scores: ``low``, ``high`` and ``ticks``; None without any.

    It spans what is drawn rather than starting at zero: points with whiskers are read by
    position, and arms that differ by a point or two must not fall together.
    """
    scored = [arm for arm in arms if arm["score"] is not None]
    if not scored:
        return None
    drawn = [value for arm in scored for value in (arm["score"], *(arm["ci95"] or ()))]
    span = max(drawn) - min(drawn)
    margin = max(0.08 * span, 0.005 * max(1.0, abs(max(drawn))))
    step = _nice_step((span + 2 * margin) / 4)
    low = math.floor((min(drawn) - margin) / step) * step
    high = math.ceil((max(drawn) + margin) / step) * step
    if binary:
        low, high = max(0.0, low), min(1.0, high)
    return _axis(low, high, step)


def loss_curve(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """The losses over a training as points in a unit square with y downwards.

    Args:
        training: The report's section: ``evaluations``, by step, or only ``history``, by epoch.

    Returns:
        ``lines``: ``train_loss``, ``val_loss`` and ``val_exact`` -> (x, y) pairs, those known;
        ``axis``: as of ``score_axis``, for the losses, a share goes from 0 to 1; ``unit``,
        ``first`` and ``last``: of x; ``best``: x of the chosen student, None if not known.
        None without two points or a loss.
    """
    points = training.get("evaluations") or training.get("history") or []
    unit = "step" if all("step" in point for point in points) else "epoch"
    names = ("train_loss", "val_loss")
    losses = [point[name] for point in points for name in names if point.get(name) is not None]
    if len(points) < 2 or not losses:
        return None
    step = _nice_step(max(losses) / 3 or 1.0)
    axis = _axis(0.0, max(1, math.ceil(max(losses) / step)) * step, step)
    first, last = points[0][unit], points[-1][unit]
    highest = {"train_loss": axis["high"], "val_loss": axis["high"], "val_exact": 1.0}
    lines = {
        name: [
            ((point[unit] - first) / (last - first), 1 - point[name] / high)
            for point in points
            if point.get(name) is not None
        ]
        for name, high in highest.items()
    }
    best = training.get(f"best_{unit}")
    return {
        "lines": lines,
        "axis": axis,
        "unit": unit,
        "first": first,
        "last": last,
        "best": None if best is None else (best - first) / (last - first),
    }


def _axis(low: float, high: float, step: float) -> dict[str, Any]:
    ticks = [tick * step for tick in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return {"low": low, "high": high, "ticks": ticks}


def _nice_step(atleast: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least so large."""
    power = 10.0 ** math.floor(math.log10(atleast))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= atleast * 0.999)


def _arm_rows(arms: Mapping[str, Any], kind: str | None) -> list[tuple[str, list[str]]]:
    """The table of the arms: a label, and a cell for each arm."""
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        _SCORE_LABELS[kind]: lambda arm: wording.score(arm["score"], kind),
        "95 % interval": lambda arm: wording.interval(arm["ci95"], kind),
        "Examples": lambda arm: wording.count(arm["n"]),
        "Parse failures": lambda arm: wording.count(arm["parse_failures"]),
        "Errors": lambda arm: wording.count(arm["errors"]),
        "Latency, median": lambda arm: wording.milliseconds(arm["latency_ms"]["p50"]),
        "Latency, 95th percentile": lambda arm: wording.milliseconds(arm["latency_ms"]["p95"]),
        "Prompt tokens per example": lambda arm: wording.quantity(arm["prompt_tokens"]),
        "Cost of 1,000 examples": lambda arm: wording.dollars(arm["usd_per_1k"]),
    }
    return [
        (label, _unbroken([cell(arm) for arm in arms.values()])) for label, cell in cells.items()
    ]


def _unbroken(texts: list[str]) -> list[str]:
    """Texts in which no line ends between a number and its per cent sign."""
    return [text.replace(" %", "\N{NO-BREAK SPACE}%") for text in texts]


def _serve_commands(run: Mapping[str, Any]) -> list[str]:
    commands = [f"raydistill serve {shlex.quote(run.get('directory') or 'RUN_DIR')}"]
    inputs = ((run.get("config") or {}).get("data") or {}).get("inputs")
    if inputs:
        body = shlex.quote(json.dumps(dict.fromkeys(inputs, "..."), ensure_ascii=False))
        header = "-H 'Content-Type: application/json'"
        commands.append(f"curl http://127.0.0.1:8000/predict {header} -d {body}")
    return commands


def _config_text(config: Mapping[str, Any] | None) -> str | None:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else None
