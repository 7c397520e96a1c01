"""What a table of annotation must not go without: logistic regression, neighbours and CellTypist in their ordinary variants."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float, Int

from annformer.baselines import logistic
from annformer.baselines._packages import quietly, require
from annformer.baselines.expression import CLIP, Counts, Names, highly_variable, log_normalised

N_GENES = 2_000
N_COMPONENTS = 50
SELECTED_GENES = 300
"""CellTypist's own."""
NEIGHBOURS = (5, 15, 30)
VIEWS = (("all", False), ("all", True), ("HVG", False), ("HVG", True))
"""Which genes, and whether each is scaled: what the best logistic regression, and the best neighbours, are sought among."""


class Called(NamedTuple):
    """What a method says of the cells of the query.

    Attributes
    ----------
    classes
        Types of the reference, sorted.
    probabilities
        Of each type; the highest is the type that is called. CellTypist's are one against the rest and do not add up to 1.
    """

    classes: tuple[str, ...]
    probabilities: Float[np.ndarray, "cell class"]

    @property
    def types(self) -> np.ndarray:
        """The type called for each cell."""
        return np.asarray(self.classes, dtype=object)[self.probabilities.argmax(axis=1)]


def _logistic(
    reference: Counts,
    labels: Names,
    query: Counts,
    genes: Names,  # noqa: ARG001  (one signature for all)
    *,
    seed: int,
    views: tuple[tuple[str, bool], ...],
    balanced: bool = False,
) -> Called:
    """Logistic regression on the view and with the penalty that predict the reference's own cells best."""
    classes, codes = _classes(labels)
    if len(classes) == 1:
        return Called(classes, np.ones((query.shape[0], 1)))
    values = log_normalised(reference), log_normalised(query)
    best: tuple[logistic.Chosen, logistic.Coordinates] | None = None
    for kind, scale in views:
        chosen = np.flatnonzero(highly_variable(reference, None, N_GENES).genes) if kind == "HVG" else np.arange(reference.shape[1])
        at = logistic.coordinates(*_dense(values[0][:, chosen], values[1][:, chosen], scale=scale))
        found = logistic.choose(at, codes, balanced=balanced, seed=seed)
        if best is None or found.score > best[0].score:
            best = found, at
    assert best is not None
    found, at = best
    weights = logistic.fit(at.reference, codes, len(classes), found.inverse_penalty, at.size, balanced=balanced, start=found.start)
    return Called(classes, logistic.probabilities(at.query, weights, len(classes)))


def _neighbours(
    reference: Counts,
    labels: Names,
    query: Counts,
    genes: Names,  # noqa: ARG001
    *,
    seed: int,
) -> Called:
    """Shares of the nearest cells in principal components of the reference.

    Genes, scale, distance (Euclidean or cosine) and number of neighbours are those that predict the reference's own cells best.
    """
    from sklearn.metrics import f1_score

    classes, codes = _classes(labels)
    fold = logistic.folds(codes, seed)
    best: tuple[float, int, np.ndarray, np.ndarray] | None = None
    for known, asked in _spaces(reference, query, seed):
        said = np.empty((len(NEIGHBOURS), len(codes)), dtype=np.int64)
        for i in range(logistic.N_FOLDS):
            learnt, held = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
            near = learnt[_nearest(known[learnt], known[held], NEIGHBOURS[-1])]
            for j, k in enumerate(NEIGHBOURS):
                said[j, held] = _shares(codes[near[:, :k]], len(classes)).argmax(axis=1)
        for k, each in zip(NEIGHBOURS, said, strict=True):
            score = float(f1_score(codes, each, average="macro", labels=np.arange(len(classes)), zero_division=0))
            if best is None or score > best[0]:
                best = score, k, known, asked
    assert best is not None
    _, k, known, asked = best
    return Called(classes, _shares(codes[_nearest(known, asked, k)], len(classes)))


def _spaces(reference: Counts, query: Counts, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Principal components of both, of each view, as they are and at length 1: there the Euclidean order is that of the cosine."""
    from sklearn.decomposition import PCA

    values = log_normalised(reference), log_normalised(query)
    variable = np.flatnonzero(highly_variable(reference, None, N_GENES).genes)
    for kind, scale in VIEWS:
        chosen = variable if kind == "HVG" else np.arange(reference.shape[1])
        parts: tuple[Any, Any] = (values[0][:, chosen], values[1][:, chosen])
        known, asked = _dense(*parts, scale=True) if scale else parts
        n = min(N_COMPONENTS, min(known.shape) - 1)
        pca = PCA(n, svd_solver="arpack" if not scale else "randomized", random_state=seed).fit(known)
        both = pca.transform(known), pca.transform(asked)
        yield both
        yield _at_length_1(both[0]), _at_length_1(both[1])


def _at_length_1(points: np.ndarray) -> np.ndarray:
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def _celltypist(
    reference: Counts,
    labels: Names,
    query: Counts,
    genes: Names,
    *,
    seed: int,
    select: bool = False,
) -> Called:
    """CellTypist with its defaults, cell by cell; `select` trains twice, the second time on the genes that weighed most in the first.

    It selects 300 genes a type; where there are no more than that, all are taken.
    """
    require("CellTypist")
    classes, codes = _classes(labels)
    if len(classes) == 1:
        return Called(classes, np.ones((query.shape[0], 1)))
    import anndata as ad

    names = [str(gene) for gene in genes]
    with _celltypist_alone() as celltypist:
        known = ad.AnnData(log_normalised(reference), var=pd.DataFrame(index=names))
        types = np.asarray(classes, dtype=object)[codes]
        select &= len(np.unique(known.X.indices)) > SELECTED_GENES
        model = celltypist.train(known, types, check_expression=False, feature_selection=select, n_jobs=1, random_state=seed)
        found = celltypist.annotate(ad.AnnData(log_normalised(query), var=pd.DataFrame(index=names)), model=model, majority_voting=False)
    assert tuple(found.probability_matrix.columns) == classes
    return Called(classes, found.probability_matrix.to_numpy(dtype=np.float64))


def _majority(
    reference: Counts,  # noqa: ARG001
    labels: Names,
    query: Counts,
    genes: Names,  # noqa: ARG001
    *,
    seed: int,  # noqa: ARG001
) -> Called:
    """Shares of the types in the reference, for every cell."""
    classes, codes = _classes(labels)
    return Called(classes, np.tile(np.bincount(codes) / len(codes), (query.shape[0], 1)))


def _classes(labels: Names) -> tuple[tuple[str, ...], Int[np.ndarray, "cell"]]:
    names, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return tuple(map(str, names)), codes.astype(np.int64)


def _dense(
    reference: sp.csr_matrix, query: sp.csr_matrix, *, scale: bool
) -> tuple[Float[np.ndarray, "cell gene"], Float[np.ndarray, "asked gene"]]:
    """Genes that the reference has; scaled, each has mean 0 and standard deviation 1 there, and is clipped."""
    met = np.asarray(reference.getnnz(axis=0)).ravel() > 0
    known, asked = reference[:, met].toarray(), query[:, met].toarray()
    if scale:
        mean, spread = known.mean(axis=0, dtype=np.float64), known.std(axis=0, ddof=1, dtype=np.float64)
        spread[spread == 0] = 1
        for values in (known, asked):
            values -= mean.astype(np.float32)
            values /= spread.astype(np.float32)
            np.clip(values, -CLIP, CLIP, out=values)
    return known, asked


def _nearest(known: np.ndarray, asked: np.ndarray, k: int) -> Int[np.ndarray, "asked neighbour"]:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(k, len(known)), algorithm="brute").fit(known)
    return np.asarray(search.kneighbors(asked, return_distance=False))


def _shares(codes: Int[np.ndarray, "cell neighbour"], n_classes: int) -> Float[np.ndarray, "cell class"]:
    n, k = codes.shape
    return np.bincount((np.arange(n)[:, None] * n_classes + codes).ravel(), minlength=n * n_classes).reshape(n, n_classes) / k


@contextmanager
def _celltypist_alone() -> Iterator[Any]:
    """CellTypist sets up the logging of the whole process when it is imported; its scikit-learn warns of what is to come."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings(), quietly("celltypist.logger"):
        warnings.simplefilter("ignore")
        import celltypist

        root.handlers[:] = handlers
        root.setLevel(level)
        yield celltypist


ANNOTATION: dict[str, Callable[..., Called]] = {
    "logistic regression all genes": partial(_logistic, views=VIEWS[:1]),
    "logistic regression all genes scaled": partial(_logistic, views=VIEWS[1:2]),
    "logistic regression HVG": partial(_logistic, views=VIEWS[2:]),
    "logistic regression balanced": partial(_logistic, views=VIEWS, balanced=True),
    "kNN PCA": _neighbours,
    "CellTypist": _celltypist,
    "CellTypist feature selection": partial(_celltypist, select=True),
    "majority class": _majority,
}
"""Name -> function(reference counts, labels, query counts, genes, *, seed) -> `Called`; both matrices have the same genes in columns.

Genes, scales, penalties and numbers of neighbours are chosen by cross-validation inside the reference. Logistic regression and kNN take
seconds for 2,000 cells.
"""
