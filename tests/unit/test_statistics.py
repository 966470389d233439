"""Intervals, paired differences and percentiles: known values and what holds for all input."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.evaluation.statistics import is_binary, mean_score, paired_difference, percentile

binary = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)
grade = st.integers(-20, 20).map(lambda tenth: tenth / 10)
binary_pairs = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 2), min_size=1, max_size=60)
graded_pairs = st.lists(st.tuples(grade, grade), min_size=1, max_size=12)


def right_and_wrong(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def only_ours_and_only_theirs(wins: int, losses: int, ties: int) -> tuple[list, list]:
    return [1.0] * wins + [0.0] * losses + [1.0] * ties, [0.0] * wins + [1.0] * (losses + ties)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_right_or_wrong_scores_get_the_published_wilson_interval(right, n, low, high):
    mean = mean_score(right_and_wrong(right, n))
    assert mean.value == right / n
    assert mean.ci95 == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(binary)
def test_a_wilson_interval_holds_the_mean_and_stays_within_0_and_1(scores):
    mean = mean_score(scores)
    low, high = mean.ci95
    assert 0 <= low <= mean.value <= high <= 1
    assert low < high


@settings(deadline=None)
@given(binary)
def test_a_wilson_interval_of_the_wrong_answers_mirrors_that_of_the_right_ones(scores):
    low, high = mean_score(scores).ci95
    mirrored = mean_score([1 - score for score in scores]).ci95
    assert mirrored == pytest.approx((1 - high, 1 - low))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=80))
def test_a_bootstrap_interval_lies_within_the_scores_and_repeats_exactly(scores):
    mean = mean_score([*scores, 0.5])
    if mean.ci95 is not None:
        assert min(*scores, 0.5) - 1e-9 <= mean.ci95[0] <= mean.ci95[1] <= max(*scores, 0.5) + 1e-9
    assert mean == mean_score([*scores, 0.5])


@pytest.mark.parametrize("levels", [10, 1000])
def test_a_bootstrap_interval_agrees_with_the_normal_one_for_many_examples(levels):
    n = 2000
    scores = [(i % levels) / (levels - 1) for i in range(n)]
    mean = sum(scores) / n
    half = 1.96 * math.sqrt(sum((s - mean) ** 2 for s in scores) / n / n)
    assert mean_score(scores).ci95 == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_equal_grades_have_no_interval_rather_than_one_of_no_width():
    assert mean_score([0.5, 0.5, 0.5]).ci95 is None
    assert paired_difference([0.5, 0.7], [0.5, 0.7]).ci95 is None


def test_nothing_measured_is_none():
    assert mean_score([]) is None
    assert paired_difference([], []) is None
    assert percentile([], 50) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named_with_its_place(bad):
    with pytest.raises(ValueError, match="position 1"):
        mean_score([0.5, bad])


def test_lists_of_different_length_cannot_be_paired():
    with pytest.raises(ValueError, match="found 1 and 2 scores"):
        paired_difference([1.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    # Twice the binomial tail: 2 (1 + 6) / 2^6, 2 / 2^10, ... counted by hand.
    [(1, 5, 0.21875), (0, 10, 2 / 1024), (3, 3, 1.0), (0, 0, 1.0), (2, 8, 112 / 1024)],
)
def test_right_or_wrong_scores_get_the_exact_mcnemar_p_value(wins, losses, p_value):
    ours, theirs = only_ours_and_only_theirs(wins, losses, ties=7)
    assert paired_difference(ours, theirs).p_value == p_value


def test_a_p_value_of_thousands_of_discordant_pairs_does_not_overflow():
    ours, theirs = only_ours_and_only_theirs(3000, 2800, ties=0)
    # The normal approximation with continuity correction.
    z = (3000 - 2800 - 1) / math.sqrt(5800)
    assert paired_difference(ours, theirs).p_value == pytest.approx(
        math.erfc(z / math.sqrt(2)), rel=0.01
    )


def test_the_paired_interval_of_a_full_test_set_agrees_with_the_normal_one():
    n, wins, losses = 3080, 68, 120
    ours, theirs = only_ours_and_only_theirs(wins, losses, ties=n - wins - losses)
    delta = (wins - losses) / n
    half = 1.96 * math.sqrt(((wins + losses) / n - delta**2) / n)
    difference = paired_difference(ours, theirs)
    assert difference.delta == pytest.approx(delta)
    assert difference.ci95 == pytest.approx((delta - half, delta + half), abs=0.05 * half)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    # Of 2^n sign patterns, the share with a sum at least as far from 0.
    [([0.5], 1.0), ([0.1, 0.2, 0.3, 0.4], 2 / 16), ([0.1, 0.2, -0.3, 0.4], 10 / 16)],
)
def test_graded_scores_get_the_sign_flip_p_value(differences, p_value):
    difference = paired_difference(differences, [0.0] * len(differences))
    assert difference.p_value == pytest.approx(p_value, abs=0.015)


@settings(deadline=None)
@given(binary_pairs)
def test_swapping_right_or_wrong_sides_turns_the_sign_and_keeps_p(pairs):
    ours, theirs = zip(*pairs, strict=True)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.delta == -back.delta
    assert there.p_value == back.p_value
    assert 0 < there.p_value <= 1


@settings(max_examples=30, deadline=None)
@given(graded_pairs)
def test_swapping_graded_sides_turns_the_sign_and_keeps_p(pairs):
    ours, theirs = zip(*pairs, strict=True)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.delta == pytest.approx(-back.delta)
    assert there.p_value == pytest.approx(back.p_value)
    assert 0 < there.p_value <= 1


@settings(max_examples=30, deadline=None)
@given(graded_pairs)
def test_scores_against_themselves_differ_by_nothing(pairs):
    ours = [pair[0] for pair in pairs]
    difference = paired_difference(ours, ours)
    assert (difference.delta, difference.ci95, difference.p_value) == (0.0, None, 1.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within_the_values(values):
    p50, p95 = percentile(values, 50), percentile(values, 95)
    assert min(values) <= p50 <= p95 <= max(values)


def test_percentiles_are_interpolated():
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile(list(range(101)), 95) == 95


def test_scores_are_binary_only_if_each_is_right_or_wrong():
    assert is_binary([0.0, 1.0, True])
    assert not is_binary([0.0, 0.5])
