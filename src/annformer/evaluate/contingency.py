"""Agreement of two partitions from their contingency table: what a bootstrap can count a thousand times."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def contingency_table(
    first: Int[np.ndarray, "cell"], second: Int[np.ndarray, "cell"], weight: Float[np.ndarray, "cell"], shape: tuple[int, int]
) -> Float[np.ndarray, "first second"]:
    """How often each pair of codes occurs, a cell as often as its weight says."""
    return np.bincount(first * shape[1] + second, weights=weight, minlength=shape[0] * shape[1]).reshape(shape)


def normalised_mutual_information(table: Float[np.ndarray, "first second"]) -> float:
    """Mutual information over the arithmetic mean of the two entropies; 1 for two partitions of one part each."""
    share = table / table.sum()
    rows, columns = share.sum(axis=1), share.sum(axis=0)
    if (rows > 0).sum() == 1 and (columns > 0).sum() == 1:
        return 1.0
    met = share > 0
    information = float((share[met] * np.log(share[met] / np.outer(rows, columns)[met])).sum())
    return max(information, 0.0) / ((_entropy(rows) + _entropy(columns)) / 2)


def adjusted_rand_index(table: Float[np.ndarray, "first second"]) -> float:
    """Agreement on pairs of cells, 0 by chance and 1 for the same partition."""
    n = table.sum()
    together = float((table**2).sum() - n)
    in_first, in_second = float((table.sum(axis=1) ** 2).sum() - n), float((table.sum(axis=0) ** 2).sum() - n)
    if together == in_first == in_second:
        return 1.0
    chance = in_first * in_second / float(n * (n - 1))
    return (together - chance) / ((in_first + in_second) / 2 - chance)


def _entropy(share: Float[np.ndarray, "part"]) -> float:
    met = share[share > 0]
    return float(-(met * np.log(met)).sum())
