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
        Ends of the 95 % percentile interval.
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


def verdict(ours: Float[np.ndarray, "draw"], floor: Float[np.ndarray, "draw"]) -> Verdict:
    """Judge a score by its values on the same draws of two methods; more is better."""
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(floor, dtype=np.float64)
    assert np.isfinite(difference).all(), "a score that is not defined on every draw has no verdict"
    low, high = np.quantile(difference, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    word: Literal["beats", "ties", "loses"] = "beats" if low > 0 else "loses" if high < 0 else "ties"
    return Verdict(word, float(difference.mean()), float(low), float(high))


def _groups(values: Sequence[object] | np.ndarray | pd.Series) -> list[Int[np.ndarray, "row"]]:
    codes, _ = pd.factorize(pd.Series(np.asarray(values, dtype=object)), use_na_sentinel=False)
    return [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
