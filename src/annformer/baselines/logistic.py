"""Multinomial logistic regression on thousands of genes, with the penalty chosen inside the reference.

The classifier has a solver of its own (`tasks/_linear_part.py`). That these are two is meant: a floor that shared code with what is held
against it would share its mistakes, and would rise and fall with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

STRENGTHS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
"""Inverse penalties to choose from, times the mean squared length of a centred cell: so they mean the same for all genes and for few."""
TINY = 1e-12
N_FOLDS = 3
EXACT, ROUGH = (1e-8, 500), (1e-6, 100)
"""Share by which the last step may make the loss smaller, and most steps; a penalty can be judged before its solution is exact."""
LARGEST_GRAM = 8_000
SMALLEST_VARIANCE = 1e-6
"""Of a coordinate, by the largest one's; what lies below is rounding of 32-bit numbers."""
CURVATURE = 0.05
"""Of the loss, as a guess: p(1 - p) of a cell of which the model is rather sure. It sets the speed, not the solution."""


class Coordinates(NamedTuple):
    """Cells in no more coordinates than there are reference cells, the dot products of centred cells kept.

    A penalty on the squared length of the weights does not see a rotation: what is learnt of the coordinates is what would be learnt of the
    genes.

    Attributes
    ----------
    reference, query
        Cells in rows.
    size
        Sum of squares of each coordinate over the reference.
    """

    reference: Float[np.ndarray, "cell coordinate"]
    query: Float[np.ndarray, "asked coordinate"]
    size: Float[np.ndarray, "coordinate"]


class Chosen(NamedTuple):
    """A penalty chosen by cross-validation.

    Attributes
    ----------
    score
        Its macro-F1 over the cells of the reference, each predicted by a model that did not see it.
    inverse_penalty
        C in scikit-learn's terms.
    start
        Weights near the solution.
    """

    score: float
    inverse_penalty: float
    start: Float[np.ndarray, "weight"]


def coordinates(reference: Float[np.ndarray, "cell gene"], query: Float[np.ndarray, "asked gene"]) -> Coordinates:
    """Rotate the cells by the eigenvectors of the smaller of their two Gram matrices; of large ones, the genes are kept."""
    from scipy.linalg import eigh

    mean = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    known, asked = reference - mean, query - mean
    if min(known.shape) > LARGEST_GRAM:
        return Coordinates(known, asked, np.einsum("ij,ij->j", known, known))
    by_cell = known.shape[0] <= known.shape[1]
    size, vectors = eigh(known @ known.T if by_cell else known.T @ known, driver="evd", overwrite_a=True, check_finite=False)
    kept = size > SMALLEST_VARIANCE * size.max()
    size, vectors = size[kept], vectors[:, kept]
    if not by_cell:
        return Coordinates(known @ vectors, asked @ vectors, size)
    return Coordinates(vectors * np.sqrt(size), (asked @ known.T) @ (vectors / np.sqrt(size)), size)


def choose(at: Coordinates, codes: Int[np.ndarray, "cell"], *, balanced: bool, seed: int) -> Chosen:
    """Choose the inverse penalty of the highest macro-F1 by three-fold cross-validation inside the reference; of equals the smallest."""
    from sklearn.metrics import f1_score

    n_classes, fold = int(codes.max()) + 1, folds(codes, seed)
    penalties = [strength * len(codes) / max(float(at.size.sum()), TINY) for strength in STRENGTHS]
    starts: list[Float[np.ndarray, "weight"] | None] = [None] * len(penalties)
    said = np.empty((len(penalties), len(codes)), dtype=np.int64)
    for i in range(N_FOLDS):
        known, of, asked = at.reference[fold != i], codes[fold != i], at.reference[fold == i]
        before = None
        for j, penalty in enumerate(penalties):
            start = before if starts[j] is None else starts[j]  # another fold's solution is nearer than another penalty's
            before = starts[j] = fit(known, of, n_classes, penalty, at.size, balanced=balanced, start=start, stop=ROUGH)
            said[j, fold == i] = _logits(asked, before, n_classes).argmax(axis=1)
    scores = [float(f1_score(codes, each, average="macro", labels=np.arange(n_classes), zero_division=0)) for each in said]
    best = int(np.argmax(scores))
    start = starts[best]
    assert start is not None
    return Chosen(scores[best], penalties[best], start)


def fit(
    known: Float[np.ndarray, "cell coordinate"],
    codes: Int[np.ndarray, "cell"],
    n_classes: int,
    inverse_penalty: float,
    size: Float[np.ndarray, "coordinate"],
    *,
    balanced: bool = False,
    start: Float[np.ndarray, "weight"] | None = None,
    stop: tuple[float, int] = EXACT,
) -> Float[np.ndarray, "weight"]:
    """Minimise the sum of the cells' cross-entropies plus |weights|^2 / (2 x inverse_penalty); intercepts are not penalised.

    Parameters
    ----------
    size
        Sum of squares of each coordinate: with it the steps of all coordinates are of one size, which takes a fraction of the iterations.
    balanced
        Whether all types weigh the same, whatever their numbers of cells; the mean weight of a cell is 1.
    start
        Weights to begin with.
    stop
        When: `EXACT` or `ROUGH`.

    Returns
    -------
    Weights (coordinate x class), then intercepts, in one row.
    """
    from scipy.optimize import minimize

    n, width = known.shape
    weight = _balance(codes, n_classes) if balanced else np.ones(n)
    rows = np.arange(n)
    step = np.append(1 / np.sqrt(CURVATURE * size + 1 / inverse_penalty), 1 / np.sqrt(CURVATURE * n))[:, None]

    def loss(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        theta = scaled.reshape(width + 1, n_classes) * step
        logits = (known @ theta[:-1].astype(np.float32)).astype(np.float64) + theta[-1]
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        total = shares.sum(axis=1)
        value = weight @ (np.log(total) - logits[rows, codes]) + (theta[:-1] ** 2).sum() / (2 * inverse_penalty)
        shares *= (weight / total)[:, None]
        shares[rows, codes] -= weight
        slope = np.vstack([(known.T @ shares.astype(np.float32)) + theta[:-1] / inverse_penalty, shares.sum(axis=0)])
        return float(value), (slope * step).ravel()

    first = np.zeros((width + 1) * n_classes) if start is None else (start.reshape(width + 1, n_classes) / step).ravel()
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": stop[1], "ftol": stop[0], "gtol": 1e-4})
    return (found.x.reshape(width + 1, n_classes) * step).ravel()


def probabilities(
    asked: Float[np.ndarray, "asked coordinate"], weights: Float[np.ndarray, "weight"], n_classes: int
) -> Float[np.ndarray, "asked class"]:
    """Probability of each class."""
    from scipy.special import softmax

    return np.asarray(softmax(_logits(asked, weights, n_classes), axis=1))


def _logits(asked: np.ndarray, weights: np.ndarray, n_classes: int) -> np.ndarray:
    theta = weights.reshape(-1, n_classes)
    return (asked @ theta[:-1].astype(np.float32)).astype(np.float64) + theta[-1]


def _balance(codes: np.ndarray, n_classes: int) -> np.ndarray:
    counts = np.bincount(codes, minlength=n_classes)
    return (len(codes) / (counts > 0).sum() / np.maximum(counts, 1))[codes]


def folds(codes: np.ndarray, seed: int) -> np.ndarray:
    """Cells of each type are dealt in turn, in random order: a rare type is spread as far as it goes."""
    shuffled = np.random.default_rng(seed).permutation(len(codes))
    fold = np.empty(len(codes), dtype=np.int64)
    fold[shuffled[np.argsort(codes[shuffled], kind="stable")]] = np.arange(len(codes)) % N_FOLDS
    return fold
