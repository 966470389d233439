"""How far a measured score can be trusted: intervals, paired differences, percentiles.

Pure functions over lists of numbers, always with the same answer for the same input: what
is random is seeded. What the scores mean, and which examples they pair, is for ``report``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

_Z95 = 1.959963984540054  # the 97.5th percentile of the standard normal distribution
_NUM_RESAMPLES = 10_000
_CHUNK_CELLS = 2_000_000  # resampled values held at a time: about 16 MB
_FEW_LEVELS = 64
_SEED = 0


@dataclass(frozen=True)
class Mean:
    """A mean score; ``ci95`` is None where the scores cannot tell how uncertain it is."""

    value: float
    ci95: Interval | None


@dataclass(frozen=True)
class Difference:
    """A paired difference of means; ``ci95`` is None where all differences are the same."""

    delta: float
    ci95: Interval | None
    p_value: float


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1, so that a mean is a share of right answers."""
    return all(score in (0, 1) for score in scores)


def mean_score(scores: Sequence[float]) -> Mean | None:
    """The mean with a 95 % interval; None without scores.

    Right-or-wrong scores get the Wilson score interval (Wilson 1927; recommended by
    Newcombe 1998, Statistics in Medicine 17:857), which stays honest near 0 and 1 and for
    few examples. Graded scores get the percentile bootstrap (Efron & Tibshirani 1993,
    chapter 13), which assumes nothing of how they are spread.

    Raises:
        ValueError: A score is not a finite number.
    """
    values = _finite(scores)
    if len(values) == 0:
        return None
    mean = float(values.mean())
    interval = _wilson(mean, len(values)) if is_binary(scores) else _bootstrap(values)
    return Mean(mean, interval)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """The mean of ``ours - theirs`` over the same examples; None without examples.

    The interval is a paired percentile bootstrap: examples are resampled, each with both
    its scores. The p-value is two-sided: the exact McNemar test for right-or-wrong scores
    (McNemar 1947), a sign-flip permutation test for graded ones (Fisher 1935).

    Raises:
        ValueError: The lists differ in length, or a score is not a finite number.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"found {len(ours)} and {len(theirs)} scores; a paired comparison needs two "
            "scores for each example. Pass the scores of the examples that both have."
        )
    differences = _finite(ours) - _finite(theirs)
    if len(differences) == 0:
        return None
    if is_binary(ours) and is_binary(theirs):
        p_value = _mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        p_value = _sign_flip(differences)
    return Difference(float(differences.mean()), _bootstrap(differences), p_value)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile, interpolated between neighbours; None without values."""
    return float(np.percentile(_finite(values), percent)) if len(values) else None


def _finite(values: Sequence[float]) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        at = int(np.argmin(np.isfinite(array)))
        raise ValueError(
            f"found {array[at]} at position {at}; expected finite numbers. "
            "Score such an example as failed."
        )
    return array


def _wilson(share: float, n: int) -> Interval:
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At shares of 0 and 1 a bound equals the share, but for rounding.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _bootstrap(values: Floats) -> Interval | None:
    """Percentile interval of the mean of ``values``: float64[n].

    None where all values are the same: resampling them would claim certainty.
    """
    if values.min() == values.max():
        return None
    low, high = np.percentile(_resampled_means(values), (2.5, 97.5))
    return float(low), float(high)


def _resampled_means(values: Floats) -> Floats:
    rng = np.random.default_rng(_SEED)
    n = len(values)
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) <= _FEW_LEVELS:
        # Drawing how often each level occurs is the same distribution, whatever n is.
        return rng.multinomial(n, counts / n, size=_NUM_RESAMPLES) @ levels / n
    return np.concatenate(
        [values[rng.integers(0, n, (rows, n))].mean(axis=1) for rows in _chunks(n)]
    )


def _mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact binomial test that wins and losses are equally likely."""
    n = wins + losses
    term, tail = 1, 0
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def _sign_flip(differences: Floats) -> float:
    """Two-sided permutation test that each difference could as well have the other sign.

    The observed signs count as one of the permutations, so p is never 0 (Phipson & Smyth
    2010, Statistical Applications in Genetics and Molecular Biology 9:39).
    """
    rng = np.random.default_rng(_SEED)
    n = len(differences)
    total = differences.sum()
    # Sums that are equal on paper differ by rounding; they are ties, which count.
    least = abs(total) - 1e-9 * np.abs(differences).sum()
    extreme = 0
    for rows in _chunks(n):
        bits = np.frombuffer(rng.bytes(rows * ((n + 7) // 8)), dtype=np.uint8)
        flipped = np.unpackbits(bits.reshape(rows, -1), axis=1, count=n)
        sums = total - 2 * (flipped.astype(np.float64) @ differences)
        extreme += int((np.abs(sums) >= least).sum())
    return (extreme + 1) / (_NUM_RESAMPLES + 1)


def _chunks(n: int) -> list[int]:
    """Numbers of resamples of ``n`` values that fit into memory, adding up to all."""
    size = max(1, min(_NUM_RESAMPLES, _CHUNK_CELLS // n))
    full, rest = divmod(_NUM_RESAMPLES, size)
    return [size] * full + [rest] * bool(rest)
