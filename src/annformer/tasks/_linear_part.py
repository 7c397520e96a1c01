"""The linear part of a classifier: logistic regression on log-normalised expression, at several depths of the logarithm.

How counts are scaled before the logarithm decides which differences count: at 10,000 counts a cell the step from 0 to 1 count of a shallow
cell is most of what is seen; at the median depth or below it, it is what it is. No scale is best for all cells, so several are fitted,
and what each is worth is told by cells that were not learned from (`_stack.py`). The baseline of the same name (`baselines/logistic.py`) is
another solver on purpose: see there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.linalg import LinAlgError, cholesky, solve_triangular
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
JITTER = 1e-4
"""Added to the products of cells with themselves, in mean products: more than what float32 gets wrong of them."""
MOST_STEPS = 100
FLAT = 1e-3
"""Steepness, in square roots of the cells, at which learning stops. Soon, on purpose: to go on to the very end takes three times as
long, and types of few cells that lie apart are then called worse, since weak penalties make it ever surer of the others."""
N_AXES = 64
"""Directions whose curvature is told apart; all others are taken to curve alike."""
LEAST_CURVATURE = 1e-3
"""Of the loss of a cell: one that is sure of all cells hardly curves, and steps would have no end."""
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
    x = _coordinates(features)

    def cross_fitted(parts: Int[np.ndarray, "cell"], strengths: Sequence[float]) -> Float[np.ndarray, "strength cell type"]:
        logits = np.zeros((len(strengths), len(codes), n_types))
        for part in range(int(parts.max()) + 1):
            rows, others = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
            there = x.z[others]
            for n, theta in enumerate(_path(x, rows, codes[rows], n_types, strengths, balance)):
                logits[n, others] = there @ theta[:-1].astype(np.float32) + theta[-1]
        return logits

    held_back = cross_fitted(folds, strengths)
    told = np.flatnonzero(learnable(codes, folds))
    told = told if len(told) else np.arange(len(codes))
    tempered = [_tempered(logits[told], codes[told]) for logits in held_back]
    best = int(np.argmax([said for _, said in tempered]))
    factor = tempered[best][0]
    *_, theta = _path(x, np.arange(len(codes)), codes, n_types, strengths[: best + 1], balance)
    weight = x.weight(theta[:-1]) * factor
    linear = Linear(weight.astype(np.float32), theta[-1] * factor - x.centre @ weight, _mean(features).astype(np.float32))
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


def _mean(features: sp.csr_matrix | Float[np.ndarray, "cell feature"]) -> Float[np.ndarray, "feature"]:
    return np.asarray(features.mean(axis=0), np.float64).reshape(-1)


class _Coordinates:
    """Coordinates of all cells: all that a quadratic penalty sees of their features. The features themselves, to a common scale.

    What is taken off as the centre, and that cells are among them which are not learned from, changes nothing in what is learned from
    others: the intercept is free, and the best weights lie in the span of the cells that are learned from. (On the way there all cells,
    without their types, decide where steps go.)
    """

    z: Float[np.ndarray, "cell coordinate"] | sp.csr_matrix
    centre: Float[np.ndarray, "feature"]
    """What is taken off the features."""

    def __init__(self, features: sp.csr_matrix | Float[np.ndarray, "cell feature"], scale: float) -> None:
        self.scale = scale
        if sp.issparse(features) and (features.shape[1] > FEW or np.prod(features.shape) > MOST_DENSE):
            self.centre = np.zeros(features.shape[1])
            self.z = sp.csr_matrix(features * scale, dtype=np.float32)
        else:
            self.centre = _mean(features)
            self.z = _centred(features, self.centre, scale)

    def weight(self, theta: Float[np.ndarray, "coordinate type"]) -> Float[np.ndarray, "feature type"]:
        """Weights of the features."""
        return theta * self.scale

    @cached_property
    def curvature(self) -> _Curvature:
        """How far the cells spread along which axes."""
        return _curvature(self.z)


class _Products(_Coordinates):
    """From the products of cells with cells, where there are fewer cells than features: L of the Cholesky decomposition L L' of these."""

    def __init__(self, features: sp.csr_matrix | Float[np.ndarray, "cell feature"], scale: float) -> None:
        self.scale, self.features, self.centre = scale, features, _mean(features)
        dense = _centred(features, self.centre, scale)  # a common part would hide the differences in float32
        gram = (dense @ dense.T).astype(np.float64)
        del dense
        means = gram.mean(axis=0)
        gram += means.mean() - means[:, None] - means[None, :]  # the sum over all cells is nothing, but for what float32 gets wrong
        self.lower = _lower(gram)
        self.z = self.lower.astype(np.float32)

    def weight(self, theta: Float[np.ndarray, "coordinate type"]) -> Float[np.ndarray, "feature type"]:
        dual = solve_triangular(self.lower, theta, lower=True, trans="T")
        return (np.asarray(self.features.T @ dual, np.float64) - np.outer(self.centre, dual.sum(axis=0))) * self.scale**2


def _lower(gram: Float[np.ndarray, "cell cell"]) -> Float[np.ndarray, "cell cell"]:
    """L of products = L L', a little added to these, and more where that is not enough."""
    added = JITTER * max(float(np.trace(gram)) / len(gram), 1e-12)
    while True:
        try:
            raised = gram.copy()
            raised[np.diag_indices(len(gram))] += added
            return cholesky(raised, lower=True, overwrite_a=True)
        except LinAlgError:
            added *= 10


def _coordinates(features: sp.csr_matrix | Float[np.ndarray, "cell feature"]) -> _Coordinates:
    """The cheapest exact ones."""
    n, p = features.shape
    squares = features.multiply(features).sum() if sp.issparse(features) else np.square(features, dtype=np.float64).sum()
    scale = LENGTH / max(float(np.sqrt(squares / n)), 1e-12)
    return _Products(features, scale) if n < p and n <= FEW else _Coordinates(features, scale)


def _centred(
    features: sp.csr_matrix | Float[np.ndarray, "cell feature"], centre: Float[np.ndarray, "feature"], scale: float
) -> Float[np.ndarray, "cell feature"]:
    dense = np.asarray(features if isinstance(features, np.ndarray) else features.toarray(), np.float32) * np.float32(scale)
    return dense - (centre * scale).astype(np.float32)


class _Curvature(NamedTuple):
    """Sums of squares of all cells along the axes where they are greatest, and along any other on average."""

    axes: Float[np.ndarray, "coordinate axis"]
    squares: Float[np.ndarray, "axis"]
    others: float


def _curvature(z: Float[np.ndarray, "cell coordinate"] | sp.csr_matrix) -> _Curvature:
    """By a randomised decomposition (Halko et al. 2011), where there are many coordinates."""
    r = z.shape[1]
    axes = np.random.default_rng(0).normal(size=(r, min(r, N_AXES))).astype(np.float32)
    for _ in range(3):
        axes = np.linalg.qr(np.asarray(z.T @ np.asarray(z @ axes)))[0]
    along = np.asarray(z @ axes, np.float64)
    squares, turned = np.linalg.eigh(along.T @ along)
    squares = np.maximum(squares, 0.0)
    total = float(z.multiply(z).sum()) if sp.issparse(z) else float(np.einsum("cr,cr->", z, z, dtype=np.float64))
    return _Curvature((axes @ turned).astype(np.float32), squares, max(0.0, total - float(squares.sum())) / max(1, r - len(squares)))


class _Rounded:
    """Other variables for theta, in which the loss curves about as much in all directions, so that few steps are needed."""

    def __init__(self, curvature: _Curvature, each: float, n: int, strength: float) -> None:
        self.axes = curvature.axes
        self.rest = (each * curvature.others + 1 / strength) ** -0.5
        self.factors = (each * curvature.squares[:, None] + 1 / strength) ** -0.5
        self.intercept = (each * n) ** -0.5

    def theta(self, phi: Float[np.ndarray, "coordinate+1 type"]) -> Float[np.ndarray, "coordinate+1 type"]:
        """Theta of the variables; also their gradient, of that of theta."""
        return self._stretched(phi, self.factors, self.rest, self.intercept)

    def phi(self, theta: Float[np.ndarray, "coordinate+1 type"]) -> Float[np.ndarray, "coordinate+1 type"]:
        """Undo `theta`."""
        return self._stretched(theta, 1 / self.factors, 1 / self.rest, 1 / self.intercept)

    def _stretched(self, x: np.ndarray, factors: np.ndarray, rest: float, intercept: float) -> np.ndarray:
        along = (factors - rest) * (self.axes.T @ x[:-1].astype(np.float32))
        return np.vstack((rest * x[:-1] + self.axes @ along.astype(np.float32), intercept * x[-1:]))


def _path(
    x: _Coordinates,
    rows: Int[np.ndarray, "cell"],
    codes: Int[np.ndarray, "cell"],
    n_types: int,
    strengths: Sequence[float],
    balance: float,
) -> Iterator[Float[np.ndarray, "coordinate+1 type"]]:
    """Solutions of some cells for ascending strengths, each begun at the one before; the last row is the intercept."""
    z, n = x.z[rows], len(rows)
    share = n / x.z.shape[0]
    sizes = np.bincount(codes, minlength=n_types)
    weights = (np.maximum(sizes, 1.0) ** -balance)[codes]
    weights *= n / weights.sum()
    truth = np.zeros((n, n_types))
    truth[np.arange(n), codes] = 1
    theta = np.zeros((z.shape[1] + 1, n_types))

    def logs_of(at: Float[np.ndarray, "coordinate+1 type"]) -> Float[np.ndarray, "cell type"]:
        return log_softmax(np.asarray(z @ at[:-1].astype(np.float32), np.float64) + at[-1], axis=1)

    def loss(flat: np.ndarray, strength: float, rounded: _Rounded) -> tuple[float, np.ndarray]:
        at = rounded.theta(flat.reshape(theta.shape))
        logs = logs_of(at)
        residual = (np.exp(logs) - truth) * weights[:, None]
        gradient = np.empty_like(at)
        gradient[:-1] = np.asarray(z.T @ residual.astype(np.float32), np.float64) + at[:-1] / strength
        gradient[-1] = residual.sum(axis=0)
        value = -float((weights * logs[np.arange(n), codes]).sum()) + float(np.square(at[:-1]).sum()) / (2 * strength)
        return value, rounded.theta(gradient).ravel()

    steepness = float(FLAT * np.sqrt(n))
    for strength in strengths:
        probabilities = np.exp(logs_of(theta))
        each = max(float((weights[:, None] * probabilities * (1 - probabilities)).mean()), LEAST_CURVATURE)
        rounded = _Rounded(x.curvature, each * share, x.z.shape[0], strength)
        start: np.ndarray = rounded.phi(theta).ravel()
        found = minimize(
            loss,
            start,
            args=(strength, rounded),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MOST_STEPS, "gtol": steepness, "ftol": 1e-8},
        )
        theta = rounded.theta(found.x.reshape(theta.shape))
        yield theta.copy()
