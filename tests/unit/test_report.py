"""The report: what its numbers are, that unknown ones are null, and how it reads."""

import io
import json
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from distill.evaluation.report import (
    ExampleResult,
    build_report,
    compare,
    disagreements,
    render_html,
    render_terminal,
    summarise_arm,
)

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\'&'
DASH = "\N{EN DASH}"
DESIGN_KEYS = ("arms", "comparison", "tracing", "training", "leakage")


def result(example_id="a", score=1.0, status="ok", **other) -> ExampleResult:
    fields = {
        "latency_ms": 10.0,
        "prompt_tokens": 20,
        "completion_tokens": 5,
        "cost_usd": 0.001,
        "inputs": {"text": f"question {example_id}"},
        "expected": {"label": "x"},
        "prediction": {"label": "x" if score else "y"} if status == "ok" else None,
    }
    return ExampleResult(example_id, score, status, **(fields | other))


def arm(scores) -> list[ExampleResult]:
    return [result(str(i), score) for i, score in enumerate(scores)]


def report(teacher=None, student=None, base=None, **other) -> dict:
    sections = {
        "tracing": {"examples": 10, "kept": 8, "rejected": {"metric": 2}, "cost_usd": 0.5},
        "training": {"rows": 8, "history": [{"epoch": 1, "train_loss": 2.0, "val_loss": 1.5}]},
        "leakage": {"test_in_train": 0},
        "run": {"name": "demo", "directory": "runs/demo", "config": {"data": {"inputs": ["q"]}}},
    }
    arms = {"teacher": teacher, "base": base, "student": student}
    return build_report(arms=arms, **(sections | other))


def terminal_text(rendered: dict) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render_terminal(rendered))
    return console.file.getvalue()


class Page(HTMLParser):
    """The text and the tags of a page; notes each tag that is closed out of order."""

    VOID = ("meta", "br", "img")

    def __init__(self, html: str):
        super().__init__()
        self.text, self.tags, self.attributes, self.open, self.misnested = "", [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


EPOCHS = [{"epoch": n, "train_loss": 3.0 / n, "val_loss": 4.0 / n} for n in (1, 2, 3)]
REPORTS = {
    "all arms": report(arm([1, 1, 0, 1]), arm([1, 0, 1, 1]), arm([0, 0, 0, 0])),
    "graded": report(arm([0.25, 0.5, 1]), arm([0.75, 0.5, 0.1])),
    "no metric": report(arm([None] * 3), arm([None] * 3)),
    "teacher only": report(arm([1, 0])),
    "nothing": build_report(arms={}, tracing={}, training={}, leakage={}, run={}),
    "no examples": report([], []),
    "no disagreement": report(arm([1, 0]), arm([1, 0])),
    "all failed": report(arm([1.0]), [result("0", None, "error")]),
    "epochs": report(training={"history": EPOCHS}),
    "zero loss": report(
        training={"history": [{"epoch": n, "train_loss": 0.0, "val_loss": None} for n in (1, 2)]}
    ),
    "folded": report(folding={"rows_folded": 8, "unfoldable": {"chat": "has a History field"}}),
    "leak": report(arm([1]), arm([1]), leakage={"test_in_train": 3}),
}


def test_an_arm_has_the_keys_of_report_json():
    assert summarise_arm(arm([1, 1, 0, 1])) == {
        "score": 0.75,
        "ci95": [pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4)],
        "n": 4,
        "parse_failures": 0,
        "errors": 0,
        "latency_ms": {"p50": 10.0, "p95": 10.0},
        "prompt_tokens": 20,
        "usd_per_1k": pytest.approx(1.0),
    }


def test_a_failed_example_scores_0_where_there_is_a_metric():
    summary = summarise_arm([result(), result("b", None, "parse"), result("c", None, "error")])
    assert summary["score"] == pytest.approx(1 / 3)
    assert (summary["n"], summary["parse_failures"], summary["errors"]) == (3, 1, 1)


def test_an_arm_that_failed_throughout_scores_0_if_another_arm_was_scored():
    failed = [result("0", None, "error", latency_ms=None, prompt_tokens=None, cost_usd=None)]
    assert summarise_arm(failed)["score"] is None
    assert report(arm([1.0]), failed)["arms"]["student"]["score"] == 0.0


def test_without_a_metric_scores_and_their_comparison_are_null():
    built = report(arm([None] * 3), arm([None] * 3))
    assert built["arms"]["student"]["score"] is None
    assert built["arms"]["student"]["ci95"] is None
    assert built["arms"]["student"]["n"] == 3
    nulls = {"delta": None, "ci95": None, "p_value": None}
    assert built["comparison"] == {"student_minus_teacher": nulls}


def test_what_nobody_measured_is_null():
    unknown = [result(latency_ms=None, prompt_tokens=None, cost_usd=None)]
    summary = summarise_arm(unknown)
    assert summary["latency_ms"] == {"p50": None, "p95": None}
    assert summary["prompt_tokens"] is None
    assert summary["usd_per_1k"] is None


def test_a_cost_of_nothing_is_0_and_not_unknown():
    assert summarise_arm([result(cost_usd=0.0)])["usd_per_1k"] == 0.0


def test_the_latency_of_an_example_that_failed_is_left_out():
    results = [result(latency_ms=10.0), result("b", None, "error", latency_ms=9000.0)]
    assert summarise_arm(results)["latency_ms"]["p95"] == 10.0


def test_arms_are_compared_over_the_examples_that_both_have():
    teacher = [result("a", 1.0), result("b", 1.0), result("c", 0.0)]
    student = [result("c", 1.0), result("a", 0.0), result("z", 1.0)]
    compared = compare(student, teacher)["student_minus_teacher"]
    assert compared["delta"] == 0.0
    assert compared["p_value"] == 1.0
    assert disagreements(student, teacher)["pairs"] == 2


def test_an_example_that_occurs_twice_is_paired_once_each_time():
    twice = [result("a", 1.0), result("a", 0.0)]
    compared = compare(twice, twice)["student_minus_teacher"]
    assert compared == {"delta": 0.0, "ci95": None, "p_value": 1.0}
    assert disagreements(twice, twice)["pairs"] == 2


def test_disagreements_show_both_directions_in_turn_the_largest_first():
    teacher = arm([1.0, 1.0, 1.0, 0.0, 0.5])
    student = arm([0.0, 0.5, 0.0, 1.0, 0.5])
    differ = disagreements(student, teacher, limit=3)
    assert (differ["pairs"], differ["differ"]) == (5, 4)
    assert (differ["teacher_better"], differ["student_better"]) == (3, 1)
    assert [example["example_id"] for example in differ["examples"]] == ["0", "3", "2"]


def test_without_a_metric_disagreements_are_of_the_labelled_outputs():
    def answer(label, reasoning):
        return [result(score=None, prediction={"label": label, "reasoning": reasoning})]

    assert disagreements(answer("x", "so"), answer("x", "thus"))["differ"] == 0
    assert disagreements(answer("x", "so"), answer("y", "so"))["differ"] == 1
    assert disagreements(answer("x", "so"), answer("y", "so"))["teacher_better"] is None


def test_an_arm_that_was_not_run_is_null():
    built = report(arm([1, 0]))
    assert built["arms"]["base"] is None
    assert built["arms"]["student"] is None
    assert built["comparison"]["student_minus_teacher"]["delta"] is None


def test_every_key_of_report_json_is_there_even_if_nothing_is_known():
    built = REPORTS["nothing"]
    assert set(DESIGN_KEYS) <= set(built)
    assert built["tracing"]["rejected"] == {"metric": None, "parse": None, "error": None}
    assert set(built["training"].values()) == {None}
    assert built["leakage"] == {"test_in_train": None}


def test_a_loss_that_is_not_a_number_is_null():
    built = report(training={"train_loss": float("nan"), "history": [{"val_loss": float("inf")}]})
    assert built["training"]["train_loss"] is None
    assert built["training"]["history"][0]["val_loss"] is None
    json.dumps(built, allow_nan=False)


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_plain_json_and_renders_the_same_after_a_round_trip(name):
    built = REPORTS[name]
    again = json.loads(json.dumps(built, allow_nan=False))
    assert render_html(again) == render_html(built)
    assert terminal_text(again) == terminal_text(built)


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere(name):
    html = render_html(REPORTS[name])
    page = Page(html)
    assert page.open == []
    assert page.misnested == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {attribute for attribute, _ in page.attributes}
    assert "url(" not in html
    assert "None" not in page.text
    assert "nan" not in page.text


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_with_only_the_keys_of_the_contract_renders(name):
    bare = {key: REPORTS[name][key] for key in DESIGN_KEYS}
    assert Page(render_html(bare)).misnested == []
    terminal_text(bare)


def test_the_headline_says_both_scores_and_the_difference_with_its_interval():
    teacher, student = arm([1] * 950 + [0] * 50), arm([1] * 900 + [0] * 100)
    for text in (
        Page(render_html(report(teacher, student))).text,
        " ".join(terminal_text(report(teacher, student)).split()),
    ):
        text = text.replace("\N{MINUS SIGN}", "-")
        assert (
            "The student answers 90.0 % of 1,000 held-out examples right; the teacher 95.0 %."
            in text
        )
        assert "Difference -5.0 points (95 % interval -6.4 to -3.7)." in text


def test_graded_scores_are_not_called_shares_of_right_answers():
    text = Page(render_html(REPORTS["graded"])).text
    assert "The student scores 0.450 on average over 3 held-out examples; the teacher 0.583" in text
    assert "Right answers" not in text
    assert "points" not in text
    assert "McNemar" not in text


def test_without_a_metric_the_headline_says_how_often_the_answers_agree():
    teacher = [result(str(i), None, prediction={"label": "x"}) for i in range(4)]
    student = [result(str(i), None, prediction={"label": "xxxy"[i]}) for i in range(4)]
    assert "gives the teacher's answer on 3 of 4 held-out examples (75.0 %)" in terminal_text(
        report(teacher, student)
    )


def test_a_large_p_value_is_not_read_as_equality():
    assert "does not show that they are equally good" in render_html(REPORTS["all arms"])


def test_arms_that_never_differ_get_no_p_value_to_read():
    text = Page(render_html(REPORTS["no disagreement"])).text
    assert "student minus teacher is 0.0 points, on each of them" in text
    assert "p-value" not in text


def test_losses_are_drawn_from_the_second_epoch_on():
    assert "svg" in Page(render_html(REPORTS["epochs"])).tags
    assert "svg" not in Page(render_html(REPORTS["all arms"])).tags


def test_leaked_examples_are_said_in_the_page_and_the_terminal():
    for text in (Page(render_html(REPORTS["leak"])).text, terminal_text(REPORTS["leak"])):
        assert "3 held-out examples are also among the training data" in " ".join(text.split())


def test_unknown_numbers_are_dashes():
    assert terminal_text(report(arm([None]))).splitlines()[1].count(DASH) == 2
    assert Page(render_html(REPORTS["nothing"])).text.count(DASH) > 10


def test_commands_quote_what_a_shell_would_split():
    run = {"directory": "my runs/demo", "config": {"data": {"inputs": ["it's"]}}}
    text = Page(render_html(report(run=run))).text
    assert "raydistill serve 'my runs/demo'" in text
    assert """-d '{"it'"'"'s": "..."}'""" in text


def test_hostile_texts_stand_in_the_page_as_text_only():
    def hostile(score):
        texts = {HOSTILE: HOSTILE, "n": [HOSTILE]}
        return [result(score=score, inputs=texts, expected=texts, prediction=texts)]

    built = report(
        hostile(1.0),
        hostile(0.0),
        run={"name": HOSTILE, "config": {"k": HOSTILE}, "versions": {HOSTILE: HOSTILE}},
        folding={"unfoldable": {HOSTILE: HOSTILE}},
    )
    page = Page(render_html(built))
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in page.text


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=400))
def test_any_text_leaves_the_page_well_formed(text):
    built = report(
        [result(score=1.0, inputs={"text": text}, prediction={"label": text})],
        [result(score=0.0, prediction={"label": [text]})],
        run={"name": text},
    )
    page = Page(render_html(built))
    assert page.open == []
    assert page.misnested == []


def test_a_long_text_is_cut_and_says_so():
    built = report([result(inputs={"text": "w" * 5000})], [result(score=0.0)])
    long = disagreements([result(score=0.0, inputs={"text": "w" * 5000})], [result()])
    assert len(json.dumps(built)) < 5000
    assert long["examples"][0]["inputs"]["text"].endswith("w…")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["ok", "parse", "error"]), min_size=1, max_size=20),
    st.lists(st.floats(-5, 5), min_size=20, max_size=20),
)
def test_the_mean_difference_is_the_difference_of_the_means(statuses, scores):
    student = [
        result(str(i), scores[i] if status == "ok" else None, status)
        for i, status in enumerate(statuses)
    ]
    teacher = arm([0.5] * len(statuses))
    built = report(teacher, student)
    means = [built["arms"][name]["score"] for name in ("student", "teacher")]
    delta = built["comparison"]["student_minus_teacher"]["delta"]
    assert delta == pytest.approx(means[0] - means[1], abs=1e-9)
    render_html(built)
