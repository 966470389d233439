"""A report in words: number formats, and the sentences that say what the numbers mean.

An unknown number is a dash, and a sentence whose numbers are unknown is left out. Shared
by the page and the terminal, which ``render`` lays out.
"""

import math
from collections.abc import Mapping
from typing import Any

DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
Report = Mapping[str, Any]


def count(number: float | None) -> str:
    """A whole number, as 3,080."""
    return DASH if number is None else f"{number:,.0f}"


def quantity(number: float | None) -> str:
    """A mean of whole numbers, as 16.4 or 1,880."""
    if number is None:
        return DASH
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"


def loss(number: float | None) -> str:
    """A loss, as 0.0213."""
    return DASH if number is None else f"{number:.3g}"


def duration(seconds: float | None) -> str:
    """A time, as 12.3 s, 4 min 05 s or 2 h 05 min."""
    if seconds is None:
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def milliseconds(number: float | None) -> str:
    """A latency, as 3.2 ms, 310 ms or 1.9 s."""
    if number is None:
        return DASH
    if number < 999.5:
        return f"{number:.1f} ms" if number < 9.95 else f"{number:.0f} ms"
    return f"{number / 1000:.1f} s"


def dollars(number: float | None) -> str:
    """An amount, as $12.30 or $0.0042."""
    if number is None:
        return DASH
    decimals = 2 if number >= 0.1 or number <= 0 else 1 - math.floor(math.log10(number))
    return f"${number:,.{decimals}f}"


def score(number: float | None, kind: str | None) -> str:
    """A score: a share in per cent if answers are right or wrong, else the mean grade."""
    if number is None:
        return DASH
    return f"{100 * number:.1f} %" if kind == "binary" else _grade(number)


def interval(bounds: list[float] | None, kind: str | None) -> str:
    """An interval of a score, as 90.1 to 92.2 %."""
    if bounds is None:
        return DASH
    low, high = (score(bound, kind) for bound in bounds)
    return f"{low.removesuffix(' %')} to {high}"


def change(delta: float | None, kind: str | None, unit: bool = True) -> str:
    """A difference of scores with its sign, as -1.7 points."""
    if delta is None:
        return DASH
    size = f"{100 * abs(delta):.1f}" if kind == "binary" else _grade(abs(delta))
    sign = "" if float(size.replace(",", "")) == 0 else _MINUS if delta < 0 else "+"
    return f"{sign}{size}" + " points" * (unit and kind == "binary")


def change_interval(bounds: list[float] | None, kind: str | None) -> str:
    """An interval of a difference, as -2.5 to -0.9."""
    if bounds is None:
        return DASH
    return f"{change(bounds[0], kind, unit=False)} to {change(bounds[1], kind, unit=False)}"


def headline(report: Report) -> list[str]:
    """The result in up to three sentences."""
    kind = report.get("score_kind")
    arms = [(who, report["arms"].get(who)) for who in ("student", "teacher")]
    scored = [(who, arm) for who, arm in arms if arm and arm["score"] is not None]
    if not scored:
        return [_agreement(report), *_savings(report)]
    (who, arm), *others = scored
    value, examples = score(arm["score"], kind), f"{count(arm['n'])} held-out examples"
    if kind == "binary":
        first = f"The {who} answers {value} of {examples} right"
    else:
        first = f"The {who} scores {value} on average over {examples}"
    for other, its in others:
        first += f"; the {other} {score(its['score'], kind)}"
        first += f" of {count(its['n'])}" * (its["n"] != arm["n"])
    sentences = [first + "."]
    compared = report["comparison"]["student_minus_teacher"]
    if compared["delta"] is not None:
        bounds = f" (95 % interval {change_interval(compared['ci95'], kind)})"
        sentences.append(
            f"Difference {change(compared['delta'], kind)}{bounds * bool(compared['ci95'])}."
        )
    return sentences + _savings(report)


def comparison_words(report: Report) -> list[str]:
    """What the paired comparison says, and what its p-value does not say."""
    compared = report["comparison"]["student_minus_teacher"]
    if compared["delta"] is None:
        return []
    kind, differ = report.get("score_kind"), report.get("disagreements")
    where = (
        f"Over the {count(differ['pairs'])} examples put to both" if differ else "Over all examples"
    )
    first = f"{where}, student minus teacher is {change(compared['delta'], kind)}"
    if compared["ci95"] is None:
        return [f"{first}, on each of them: that leaves no interval to give."]
    return [
        f"{first}, with a 95 % interval of {change_interval(compared['ci95'], kind)}.",
        *_who_is_better(differ, kind),
        _p_words(compared["p_value"], kind),
    ]


def leak_words(leaked: int | None) -> str:
    """Whether held-out examples were trained on."""
    if leaked is None:
        return "Whether held-out examples are among the training data is not known."
    if leaked == 0:
        return "No held-out example is among the training data."
    verb = "example is" if leaked == 1 else "examples are"
    return (
        f"{count(leaked)} held-out {verb} also among the training data: the student has seen "
        "what it is asked, so its score may flatter it."
    )


def _who_is_better(differ: Mapping[str, Any] | None, kind: str | None) -> list[str]:
    if not differ or differ["teacher_better"] is None:
        return []
    teacher, student = count(differ["teacher_better"]), count(differ["student_better"])
    if kind == "binary":
        return [f"Only the teacher is right on {teacher} of them, only the student on {student}."]
    return [f"The teacher scores higher on {teacher} of them, the student on {student}."]


def _p_words(p_value: float, kind: str | None) -> str:
    test = "exact McNemar test" if kind == "binary" else "sign-flip permutation test"
    if p_value < 0.001:
        size, share = "below 0.001", "less than 0.1 %"
    else:
        percent = f"{100 * p_value:.{0 if p_value >= 0.1 else 1}f}"
        size, share = f"{p_value:.2g}", f"about {percent} %"
    words = (
        f"The p-value is {size} ({test}): if the two were equally good, chance alone would give "
        f"a difference this large or larger in {share} of such test sets. "
    )
    if p_value < 0.05:
        return words + (
            "It is not the probability that they are equally good, and it does not say whether "
            "the difference matters; the interval says how large it may be."
        )
    return words + (
        "That does not show that they are equally good, only that these examples cannot tell "
        "them apart; the interval says how large a difference remains possible."
    )


def _agreement(report: Report) -> str:
    differ = report.get("disagreements") or {}
    pairs = differ.get("pairs")
    if not pairs:
        return "No answers were scored."
    same = pairs - differ["differ"]
    return (
        f"The student gives the teacher's answer on {count(same)} of {count(pairs)} held-out "
        f"examples ({100 * same / pairs:.1f} %). There is no metric, so neither is scored."
    )


def _savings(report: Report) -> list[str]:
    """What the student needs for an example, beside the teacher."""
    student, teacher = report["arms"].get("student"), report["arms"].get("teacher")
    if not student or not teacher:
        return []
    tokens = student["prompt_tokens"], teacher["prompt_tokens"]
    latency = student["latency_ms"]["p50"], teacher["latency_ms"]["p50"]
    parts = []
    if None not in tokens:
        parts.append(f"{quantity(tokens[0])} prompt tokens instead of {quantity(tokens[1])}")
    if None not in latency:
        parts.append(f"{milliseconds(latency[0])} instead of {milliseconds(latency[1])} (median)")
    return [f"An example takes the student {' and '.join(parts)}."] if parts else []


def _grade(number: float) -> str:
    text = f"{number:,.3f}" if abs(number) < 10 else f"{number:,.1f}"
    return text.replace("-", _MINUS)
