"""Whether one method is better than another beyond what other cells or donors might have shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

FEWEST_UNITS = 5
"""Donors or batches that it takes to draw them; of fewer, the cells are drawn."""
LEVEL = 0.95


class Verdict(NamedTuple):
    """What the paired difference of a score says.

    Attributes
    ----------
    word
        "beats" where the whole interval lies above 0, "loses" where it lies below, else "ties".
    difference
        Mean over the draws of ours less the other's.
    low, high
        Ends of the 95 % interval.
    """

    word: Literal["beats", "ties", "loses"]
    difference: float
    low: float
    high: float


def draws(
    units: Sequence[object] | np.ndarray | pd.Series | None,
    strata: Sequence[object] | np.ndarray | pd.Series,
    n_draws: int = 1_000,
    seed: int = 0,
) -> Iterator[Int[np.ndarray, "row"]]:
    """Draw rows with replacement: whole donors or batches where there are at least five, else cells within their type.

    Parameters
    ----------
    units
        The donor or batch of each cell: what one wants to generalise to. None: cells.
    strata
        The type of each cell; cells without one are a type of their own.
    n_draws
        How many.
    seed
        The same seed draws the same rows, for every method alike.
    """
    rng = np.random.default_rng(seed)
    by_unit = units is not None and len(pd.unique(np.asarray(units, dtype=object))) >= FEWEST_UNITS
    groups = _groups(units if by_unit and units is not None else strata)
    for _ in range(n_draws):
        if by_unit:
            yield np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        else:
            yield np.concatenate([rows[rng.integers(len(rows), size=len(rows))] for rows in groups])


def verdict(ours: Float[np.ndarray, "draw"], floor: Float[np.ndarray, "draw"], n_units: int | None = None) -> Verdict:
    """Judge a score by its values on the same draws of two methods; more is better.

    Parameters
    ----------
    n_units
        How many donors or batches were drawn: the middle 95 % of the draws are widened by `widening`. None: cells were drawn.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(floor, dtype=np.float64)
    assert np.isfinite(difference).all(), "a score that is not defined on every draw has no verdict"
    mean, wider = difference.mean(), 1.0 if n_units is None else widening(n_units)
    low, high = mean + wider * (np.quantile(difference, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - mean)
    word: Literal["beats", "ties", "loses"] = "beats" if low > 0 else "loses" if high < 0 else "ties"
    return Verdict(word, float(mean), float(low), float(high))


def widening(n_units: int) -> float:
    """Factor by which few units make an interval wider than their draws show.

    A bootstrap of n units divides by n where the variance wants n - 1, and takes that variance for known: unwidened, two equal methods
    would be told apart in 16 % of the cases with 5 units and in 11 % with 8, instead of in 5 %.
    """
    from scipy import stats

    upper = (1 + LEVEL) / 2
    return float(stats.t.ppf(upper, n_units - 1) / stats.norm.ppf(upper) * np.sqrt(n_units / (n_units - 1)))


def _groups(values: Sequence[object] | np.ndarray | pd.Series) -> list[Int[np.ndarray, "row"]]:
    codes, _ = pd.factorize(pd.Series(np.asarray(values, dtype=object)), use_na_sentinel=False)
    return [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
