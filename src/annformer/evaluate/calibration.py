"""Whether confidences, sets of types and the score of being new mean what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

N_BINS = 15
LEVEL, COVERAGE_LEVEL = 0.95, 0.99

Confidence = Sequence[float] | Float[np.ndarray, "cell"]
"""The probability that a method gives to the type it calls, for each cell."""
Correct = Sequence[bool] | Bool[np.ndarray, "cell"]
"""Whether that type is the true one."""


class Interval(NamedTuple):
    """The middle of a distribution: its median, and the ends of the part that holds 95 % (or what is said) of it."""

    median: float
    low: float
    high: float


def expected_calibration_error(confidence: Confidence, correct: Correct, n_bins: int = N_BINS) -> float:
    """Mean distance between confidence and share of correct cells, over bins of equally many cells of similar confidence.

    Cells of one confidence count as correct by their common share, so that it does not matter which of them a bin's border parts from the
    others. Even perfect confidences have an error above 0, the larger the fewer cells there are: see `calibrated_error`.
    """
    said, right = _check(confidence, correct)
    return _error(said, right, n_bins)


def calibration_error_on_draws(
    confidence: Confidence, correct: Correct, draws: Iterable[Int[np.ndarray, "row"]], n_bins: int = N_BINS
) -> Float[np.ndarray, "draw"]:
    """Expected calibration error of drawn cells; `annformer.evaluate.draws` draws them, `interval` gives their middle.

    A drawn cell stands for itself as often as it is drawn, which makes the error of a draw larger than that of the cells.
    """
    said, right = _check(confidence, correct)
    return np.array([_error(said[rows], right[rows], n_bins) for rows in draws])


def calibrated_error(confidence: Confidence, *, n_bins: int = N_BINS, n_simulations: int = 1_000, seed: int = 0) -> Interval:
    """Expected calibration error that perfect confidences would show: each cell is correct with the probability that it has."""
    said, _ = _check(confidence, np.zeros(len(confidence), dtype=bool))
    rng = np.random.default_rng(seed)
    return interval(np.array([_error(said, rng.random(len(said)) < said, n_bins) for _ in range(n_simulations)]))


def interval(values: Float[np.ndarray, "draw"], level: float = LEVEL) -> Interval:
    """Median of the draws, and where the middle ones lie."""
    low, median, high = np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return Interval(float(median), float(low), float(high))


def reliability(confidence: Confidence, correct: Correct, n_bins: int = N_BINS) -> pd.DataFrame:
    """What a reliability plot shows.

    Returns
    -------
    One row per bin, from the least confident cells on: `n` cells, mean `confidence`, share `correct` of them, and `low` and `high`, the
    ends of its 95 % interval (Wilson's).
    """
    from scipy import stats

    said, right = _check(confidence, correct)
    order, edges = np.argsort(said, kind="stable"), _edges(len(said), n_bins)
    n = np.diff(np.append(edges, len(said)))
    table = pd.DataFrame({"n": n, "confidence": np.add.reduceat(said[order], edges) / n})
    share = np.add.reduceat(_shared(said, right)[order], edges) / n
    z2 = stats.norm.ppf((1 + LEVEL) / 2) ** 2
    centre, half = (share + z2 / (2 * n)) / (1 + z2 / n), np.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
    return table.assign(correct=share, low=centre - half, high=centre + half)


def coverage(sets: Bool[np.ndarray, "cell class"], truth: Int[np.ndarray, "cell"]) -> dict[str, float]:
    """Score sets of types.

    Parameters
    ----------
    sets
        Which classes each cell's set holds.
    truth
        Code of each cell's true class; -1 where it is none of them, which no set covers.

    Returns
    -------
    `coverage`, the share of cells whose set holds the true class; `mean_size` of the sets; `singletons` and `empty`, the shares of sets of
    one class and of none.
    """
    held, codes = np.asarray(sets, dtype=bool), np.asarray(truth)
    assert len(held) == len(codes), "sets and truth have different numbers of cells"
    covered, size = held[np.arange(len(codes)), codes] & (codes >= 0), held.sum(axis=1)
    return {
        "coverage": float(covered.mean()),
        "mean_size": float(size.mean()),
        "singletons": float((size == 1).mean()),
        "empty": float((size == 0).mean()),
    }


def coverage_interval(n: int, expected: float, level: float = COVERAGE_LEVEL) -> tuple[float, float]:
    """Where the coverage of `n` cells lies in 99 % of the cases (or what is said) if each is covered with the probability `expected`.

    Binomial: it knows nothing of the chance in the cells by which the sets were calibrated, which adds to it where these are few.
    """
    from scipy import stats

    low, high = stats.binom.interval(level, n, expected)
    return float(low / n), float(high / n)


def novelty_auroc(score: Sequence[float] | Float[np.ndarray, "cell"], is_new: Correct) -> float:
    """Share of pairs of a new and a known cell in which the new one has the higher score (half, if equal); NaN without such a pair."""
    return float(novelty_auroc_on_draws(score, is_new, [np.arange(len(score))])[0])


def novelty_auroc_on_draws(
    score: Sequence[float] | Float[np.ndarray, "cell"], is_new: Correct, draws: Iterable[Int[np.ndarray, "row"]]
) -> Float[np.ndarray, "draw"]:
    """Compute `novelty_auroc` of drawn cells: scores are ranked once, and a draw only counts how often each rank is drawn."""
    values, new = np.asarray(score, dtype=np.float64), np.asarray(is_new, dtype=bool)
    assert len(values) == len(new), "scores and cells differ in number"
    assert np.isfinite(values).all(), "a score that is not finite has no rank"
    distinct, rank = np.unique(values, return_inverse=True)
    found = []
    for rows in draws:
        fresh, known = (np.bincount(rank[rows[part]], minlength=len(distinct)) for part in (new[rows], ~new[rows]))
        pairs = float(fresh.sum()) * float(known.sum())
        found.append(fresh @ (np.cumsum(known) - known / 2) / pairs if pairs else np.nan)
    return np.array(found)


def _check(confidence: Confidence, correct: Correct) -> tuple[Float[np.ndarray, "cell"], Bool[np.ndarray, "cell"]]:
    said, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    assert said.shape == right.shape, "confidences and cells differ in number"
    assert len(said), "no cell to score"
    assert ((said >= 0) & (said <= 1 + 1e-6)).all(), "confidences are probabilities"
    return said, right


def _edges(n: int, n_bins: int) -> Int[np.ndarray, "bin"]:
    """First cell of each bin; no bin is empty."""
    return np.unique(np.linspace(0, n, min(n_bins, n) + 1).astype(np.int64))[:-1]


def _error(said: Float[np.ndarray, "cell"], right: Bool[np.ndarray, "cell"], n_bins: int) -> float:
    order = np.argsort(said, kind="stable")
    apart = np.add.reduceat((said - _shared(said, right))[order], _edges(len(said), n_bins))
    return float(np.abs(apart).sum() / len(said))


def _shared(said: Float[np.ndarray, "cell"], right: Bool[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
    """Share of correct cells among those of the same confidence, for each cell."""
    _, group, n = np.unique(said, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=right) / n)[group]
