"""The linear part of a classifier: logistic regression on log-normalised expression, at several depths of the logarithm.

How counts are scaled before the logarithm decides which differences count: at 10,000 counts a cell the step from 0 to 1 count of a shallow
cell is most of what is seen; at the median depth or below it, it is what it is. No scale is best for all cells, so several are fitted,
and what each is worth is told by cells that were not learned from (`_stack.py`). The baseline of the same name (`baselines/logistic.py`) is
another solver on purpose: see there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

from annformer.tasks._annotation_cells import learnable
from annformer.tasks._stack import smoothed

FEW = 6_000
"""Up to so many cells or genes, the smaller number of the two, everything is done on as many coordinates, which is exact."""
LENGTH = 30.0
"""Features are scaled to this root of the mean squared length, so that strengths mean the same for all of them."""
MOST_DENSE = 2e8
"""Numbers that may stand in memory beside the sparse ones."""
JITTER = 1e-5
MOST_STEPS = 100
TEMPERATURES = (1.0, 20.0)
"""Between which factors of logits are sought: against what is too sure there are stronger penalties."""


class Linear(NamedTuple):
    """A linear map from features to logits."""

    weight: Float[np.ndarray, "feature type"]
    bias: Float[np.ndarray, "type"]
    mean: Float[np.ndarray, "feature"]
    """Of the features where they were learned: what a feature counts as that was not measured."""

    def logits(self, features: sp.csr_matrix | Float[np.ndarray, "cell feature"]) -> Float[np.ndarray, "cell type"]:
        """Not normalised."""
        return np.asarray(features @ self.weight, np.float64) + self.bias


class Fitted(NamedTuple):
    """A linear map, and what maps like it said of cells that they had not learned from."""

    linear: Linear
    out_of_fold: Float[np.ndarray, "cell type"]
    """Logits of every training cell, by a map fitted on the other folds."""
    strength: float
    factor: float
    """By which all logits were multiplied: their temperature."""
    out_of_stratum: Float[np.ndarray, "cell type"] | None
    """Likewise, by a map fitted on the cells of the other strata."""


def fit_linear(
    features: sp.csr_matrix | Float[np.ndarray, "cell feature"],
    codes: Int[np.ndarray, "cell"],
    n_types: int,
    folds: Int[np.ndarray, "cell"],
    *,
    strengths: Sequence[float],
    balance: float,
    strata: Int[np.ndarray, "cell"] | None = None,
) -> Fitted:
    """Fit multinomial logistic regression with a quadratic penalty, whose strength is the one that says most of cells held back.

    What it says is taken at its best temperature, and so are the logits: a strong penalty makes them timid, which is no fault where all
    types are as frequent in what is minimised. Judged as they are, strong penalties would never be chosen.

    Parameters
    ----------
    folds
        Number of the fold in which each cell is held back.
    strengths
        Inverse penalties to choose from, ascending.
    balance
        A cell of a type of n cells weighs n to the power of -balance.
    strata
        Another way to part the cells, to be held back by with the strength that was chosen.
    """
    x = _Features(features)

    def cross_fitted(parts: Int[np.ndarray, "cell"], strengths: Sequence[float]) -> Float[np.ndarray, "strength cell type"]:
        logits = np.zeros((len(strengths), len(codes), n_types))
        for part in range(int(parts.max()) + 1):
            rows, others = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
            plane = x.plane(rows)
            there = plane.apply(others)
            for n, theta in enumerate(_path(plane.z, codes[rows], n_types, strengths, balance)):
                logits[n, others] = there @ theta[:-1] + theta[-1]
        return logits

    held_back = cross_fitted(folds, strengths)
    told = np.flatnonzero(learnable(codes, folds))
    told = told if len(told) else np.arange(len(codes))
    tempered = [_tempered(logits[told], codes[told]) for logits in held_back]
    best = int(np.argmax([said for _, said in tempered]))
    factor = tempered[best][0]
    plane = x.plane(np.arange(len(codes)))
    *_, theta = _path(plane.z, codes, n_types, strengths[: best + 1], balance)
    weight = plane.weight(theta[:-1]) * factor
    mean = np.asarray(features.mean(axis=0), np.float64).reshape(-1)
    linear = Linear(weight.astype(np.float32), theta[-1] * factor - plane.centre @ weight, mean.astype(np.float32))
    apart = None if strata is None else cross_fitted(strata, strengths[: best + 1])[best] * factor
    return Fitted(linear, held_back[best] * factor, float(strengths[best]), factor, apart)


def _tempered(logits: Float[np.ndarray, "cell type"], codes: Int[np.ndarray, "cell"]) -> tuple[float, float]:
    """The factor under which logits say most of the true types, and how much that is."""

    def loss(log_factor: float) -> float:
        return -smoothed(log_softmax(np.exp(log_factor) * logits, axis=1), codes)

    found = minimize_scalar(loss, bounds=(np.log(TEMPERATURES[0]), np.log(TEMPERATURES[1])), method="bounded")
    return float(np.exp(found.x)), -float(found.fun)


def fit_scaled(
    features: sp.csr_matrix,
    columns: Int[np.ndarray, "column"],
    codes: Int[np.ndarray, "cell"],
    n_types: int,
    folds: Int[np.ndarray, "cell"],
    *,
    strengths: Sequence[float],
    strata: Int[np.ndarray, "cell"] | None = None,
) -> Fitted:
    """Likewise on some of the features, each scaled to variance 1, with all types as frequent as each other; a map from all features.

    With a strong penalty this is near to the nearest centre of a type. Clusters found in scaled variable genes, which many labels come
    from, are told apart by it better than by any other part (benchmarks/README.md).
    """
    some = sp.csr_matrix(features[:, columns])
    mean = np.asarray(some.mean(axis=0), np.float64).reshape(-1)
    squares = np.asarray(some.multiply(some).mean(axis=0), np.float64).reshape(-1)
    variance = squares - mean**2
    scale = np.where(variance > 1e-8, 1 / np.sqrt(np.maximum(variance, 1e-8)), 0.0)
    scaled = sp.csr_matrix(some @ sp.diags(scale), dtype=np.float32)
    fitted = fit_linear(scaled, codes, n_types, folds, strengths=strengths, balance=1.0, strata=strata)
    weight = np.zeros((features.shape[1], n_types), np.float32)
    weight[columns] = fitted.linear.weight * scale[:, None]
    whole = np.asarray(features.mean(axis=0), np.float32).reshape(-1)
    return fitted._replace(linear=Linear(weight, fitted.linear.bias, whole))


class _Features:
    """Features of all cells; knows the cheapest exact coordinates of any part of them."""

    def __init__(self, features: sp.csr_matrix | Float[np.ndarray, "cell feature"]) -> None:
        self.x = features
        squares = features.multiply(features).sum() if sp.issparse(features) else np.square(features, dtype=np.float64).sum()
        self.scale = LENGTH / max(float(np.sqrt(squares / features.shape[0])), 1e-12)
        n, p = features.shape
        self.by_products = n < p and n <= FEW
        self.gram = None
        if self.by_products:
            dense = self.dense(np.arange(n))
            dense -= dense.mean(axis=0, dtype=np.float64).astype(np.float32)  # a common part would hide the differences in float32
            self.gram = (dense @ dense.T).astype(np.float64)

    def dense(self, rows: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell feature"]:
        part = self.x[rows]
        return np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), np.float32) * np.float32(self.scale)

    def plane(self, rows: Int[np.ndarray, "cell"]) -> _Plane:
        """Coordinates that span the centred features of these cells."""
        return _ProductPlane(self, rows) if self.by_products else _FeaturePlane(self, rows)


class _Plane:
    """Coordinates of some cells: all that a quadratic penalty sees of their features."""

    z: Float[np.ndarray, "cell coordinate"] | sp.csr_matrix
    centre: Float[np.ndarray, "feature"]
    """What is taken off the features."""

    def apply(self, rows: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell coordinate"]:
        """Coordinates of other cells."""
        raise NotImplementedError

    def weight(self, theta: Float[np.ndarray, "coordinate type"]) -> Float[np.ndarray, "feature type"]:
        """Weights of the features."""
        raise NotImplementedError


class _ProductPlane(_Plane):
    """From the products of cells with cells, where there are fewer cells than features: L of the Cholesky decomposition L L' of these."""

    def __init__(self, features: _Features, rows: Int[np.ndarray, "cell"]) -> None:
        assert features.gram is not None
        self.features, self.rows = features, rows
        gram = features.gram[np.ix_(rows, rows)]
        self.means = gram.mean(axis=0)
        centred = gram - self.means[:, None] - self.means[None, :] + self.means.mean()
        centred[np.diag_indices(len(rows))] += JITTER * max(float(np.trace(centred)) / len(rows), 1e-12)
        self.lower = cholesky(centred, lower=True)
        self.z = self.lower.astype(np.float32)
        self.centre = np.asarray(features.x[rows].mean(axis=0), np.float64).reshape(-1)

    def apply(self, rows: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell coordinate"]:
        assert self.features.gram is not None
        products = self.features.gram[np.ix_(rows, self.rows)]
        centred = products - products.mean(axis=1, keepdims=True) - self.means + self.means.mean()
        return solve_triangular(self.lower, centred.T, lower=True).T

    def weight(self, theta: Float[np.ndarray, "coordinate type"]) -> Float[np.ndarray, "feature type"]:
        dual = solve_triangular(self.lower, theta, lower=True, trans="T")
        x = self.features.x[self.rows]
        weight = np.asarray(x.T @ dual, np.float64) - np.outer(self.centre, dual.sum(axis=0))
        return weight * self.features.scale**2


class _FeaturePlane(_Plane):
    """The features themselves, centred where that is no matter of memory."""

    def __init__(self, features: _Features, rows: Int[np.ndarray, "cell"]) -> None:
        self.features = features
        self.sparse = sp.issparse(features.x) and (features.x.shape[1] > FEW or np.prod(features.x.shape) > MOST_DENSE)
        mean = np.asarray(features.x[rows].mean(axis=0), np.float64).reshape(-1)
        self.centre = np.zeros_like(mean) if self.sparse else mean
        self.z = self.apply(rows)

    def apply(self, rows: Int[np.ndarray, "cell"]) -> Any:
        if self.sparse:
            return sp.csr_matrix(self.features.x[rows] * self.features.scale, dtype=np.float32)
        return self.features.dense(rows) - (self.centre * self.features.scale).astype(np.float32)

    def weight(self, theta: Float[np.ndarray, "coordinate type"]) -> Float[np.ndarray, "feature type"]:
        return theta * self.features.scale


def _path(
    z: Float[np.ndarray, "cell coordinate"] | sp.csr_matrix,
    codes: Int[np.ndarray, "cell"],
    n_types: int,
    strengths: Sequence[float],
    balance: float,
) -> Iterator[Float[np.ndarray, "coordinate+1 type"]]:
    """Solutions for ascending strengths, each begun at the one before; the last row is the intercept."""
    n, r = z.shape
    sizes = np.bincount(codes, minlength=n_types)
    weights = (np.maximum(sizes, 1.0) ** -balance)[codes]
    weights *= n / weights.sum()
    truth = np.zeros((n, n_types))
    truth[np.arange(n), codes] = 1
    theta = np.zeros((r + 1) * n_types)

    def loss(flat: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        at = flat.reshape(r + 1, n_types)
        logs = log_softmax(np.asarray(z @ at[:-1].astype(np.float32), np.float64) + at[-1], axis=1)
        residual = (np.exp(logs) - truth) * weights[:, None]
        gradient = np.empty_like(at)
        gradient[:-1] = np.asarray(z.T @ residual.astype(np.float32), np.float64) + at[:-1] / strength
        gradient[-1] = residual.sum(axis=0)
        value = -float((weights * logs[np.arange(n), codes]).sum()) + float(np.square(at[:-1]).sum()) / (2 * strength)
        return value, gradient.ravel()

    for strength in strengths:
        found = minimize(
            loss, theta, args=(strength,), jac=True, method="L-BFGS-B", options={"maxiter": MOST_STEPS, "gtol": 1e-3, "ftol": 1e-8}
        )
        theta = found.x
        yield theta.reshape(r + 1, n_types).copy()
