"""How unlike the reference a cell is: a number between 0 and 1 whose meaning is that of a percentile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from annformer.tasks._stack import thinned

log = logging.getLogger(__name__)

N_COMPONENTS = 50
SHRINKAGE = 1e-3
TAIL = 20
MOST_BEYOND = 20.0
"""Logarithms by which a cell beyond all known ones may seem stranger than they."""
NOVEL = 0.99
"""Novelty above which a cell is called unassigned: so is one of a hundred cells of known types."""
ENOUGH = 100
"""Held-back cells from which on one of a hundred can be told."""
NONE = np.zeros(0, np.int64)


Features = sp.csr_matrix | Float[np.ndarray, "cell feature"]
"""Log-normalised expression, or cell states of the network."""


class Space(NamedTuple):
    """Principal components of the features, and where in them the types lie."""

    components: Float[np.ndarray, "feature component"]
    """Whitened within the types."""
    centres: Float[np.ndarray, "type component"]
    mean: Float[np.ndarray, "feature"]
    """What a gene counts as that was not measured."""

    def distance(self, features: Features, missing: Int[np.ndarray, "missing"] = NONE) -> Float[np.ndarray, "cell"]:
        """Mahalanobis distance to the nearest type (Lee et al. 2018); `missing` are places of genes that were not measured."""
        at = np.asarray(features @ self.components, np.float64) + self.mean[missing] @ self.components[missing]
        squares = np.square(at).sum(1)[:, None] + np.square(self.centres).sum(1) - 2 * at @ self.centres.T
        return np.sqrt(np.maximum(squares.min(axis=1), 0))


class Novelty(NamedTuple):
    """Ways to be unlike the reference, far from every type in a space or between types, and how known cells held back are by all of them.

    Distance in expression alone misses cells that differ in few genes of many; the network's states alone miss others. What is rare by any
    of them counts: their tail probabilities are joined as Fisher (1932) did. On three development sets, each type left out in turn, this
    was better than any way alone, than any two, and than the sum or the greatest of the ranks (benchmarks/README.md).
    """

    spaces: tuple[Space, ...]
    known: Float[np.ndarray, "held_back way"]
    """A distance for each space, and 1 - the highest probability; each column ascending."""
    joined: Float[np.ndarray, "held_back"]
    """What all columns say together; ascending."""

    def of(self, distances: Sequence[Float[np.ndarray, "cell"]], doubt: Float[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
        """Share of the held-back cells, all of known types, that are less novel."""
        return _rank(self.joined, _joined(self.known, [*distances, doubt]))


def _axes(features: Features) -> Float[np.ndarray, "feature component"]:
    """Principal axes of the cells."""
    from sklearn.decomposition import PCA

    n_components = min(N_COMPONENTS, min(features.shape) - 1)
    found = PCA(n_components, svd_solver="arpack", tol=1e-2, random_state=0).fit(features)
    return np.asarray(found.components_, np.float64).T


def fit_space(features: Features, codes: Int[np.ndarray, "cell"], n_types: int) -> Space:
    """Find components of all cells, and in them centres and common spread of the types that are there."""
    axes = _axes(features)
    at = np.asarray(features @ axes)
    counts = np.bincount(codes, minlength=n_types)
    there = np.flatnonzero(counts)
    centres = np.stack([at[codes == code].mean(axis=0) for code in there])
    rest = at - centres[np.searchsorted(there, codes)]
    spread = rest.T @ rest / max(len(at) - len(there), 1)
    spread += (SHRINKAGE * np.var(at, axis=0).mean() + 1e-12) * np.eye(at.shape[1])
    white = np.linalg.inv(np.linalg.cholesky(spread)).T
    mean = np.asarray(features.mean(axis=0), np.float32).reshape(-1)
    return Space((axes @ white).astype(np.float32), centres @ white, mean)


def fit_novelty(
    views: Sequence[Features],
    codes: Int[np.ndarray, "cell"],
    n_types: int,
    folds: Int[np.ndarray, "cell"],
    held_back: Int[np.ndarray, "held_back"],
    doubt: Float[np.ndarray, "held_back"],
) -> Novelty:
    """Measure known cells as if they were new: against the types of the other folds.

    Parameters
    ----------
    views
        Features of all cells, for a space each.
    held_back
        Rows of the cells whose `doubt`, 1 - the highest probability, comes from parts that had not learned from them.
    """
    own = [*(_distances(features, codes, n_types, folds)[held_back] for features in views), doubt]
    known = np.column_stack([thinned(np.sort(column)) for column in own])
    spaces = tuple(fit_space(features, codes, n_types) for features in views)
    return Novelty(spaces, known, thinned(np.sort(_joined(known, own))))


def warn_if_coarse(novelty: Novelty) -> None:
    """Say when too few cells were held back for the usual limit to mean what it says."""
    if (n := len(novelty.joined)) < ENOUGH:
        said = "%d cells were held back, too few to tell what one known cell in %d looks like: do not trust a limit of %g unseen"
        log.warning(said, n, ENOUGH, NOVEL)


def _distances(
    features: Features, codes: Int[np.ndarray, "cell"], n_types: int, folds: Int[np.ndarray, "cell"]
) -> Float[np.ndarray, "cell"]:
    """Distance of every cell to the types of the other folds."""
    found = np.full(len(codes), np.nan)
    for fold in range(int(folds.max()) + 1):
        rows, others = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        # components too: those of cells that helped to find them are too near
        found[others] = fit_space(features[rows], codes[rows], n_types).distance(features[others])
    return found


def _joined(known: Float[np.ndarray, "known way"], values: Sequence[Float[np.ndarray, "cell"]]) -> Float[np.ndarray, "cell"]:
    """Sum over the ways of -log of the share of known cells that are as strange."""
    return np.sum([_surprise(column, one) for column, one in zip(known.T, values, strict=True)], axis=0)


def _surprise(known: Float[np.ndarray, "known"], values: Float[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
    """-log of the share of the known values that are as high; beyond them it grows as the tail of the highest twentieth falls off.

    Without that one way could never tell by itself: no cell would be stranger than half of one in all that are known.
    """
    share = np.maximum(1 - _rank(known, values), 0.5 / len(known))
    tail = known[-max(len(known) // TAIL, 2) :]
    scale = max(float((tail - tail[0]).mean()), 1e-9)
    return -np.log(share) + np.clip((values - known[-1]) / scale, 0, MOST_BEYOND)


def _rank(known: Float[np.ndarray, "known"], values: Float[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
    """Share of the known values below; half of those that are equal."""
    below, upto = np.searchsorted(known, values, "left"), np.searchsorted(known, values, "right")
    return (below + upto) / (2 * len(known))
