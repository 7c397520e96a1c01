"""From the logits of several parts to one calibrated answer: probabilities, a type, a set of types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax

TILTS = np.linspace(0, 1, 9)
"""How much of the logarithm of its frequency a type may lose before the most probable one is called."""
MOST_WEIGHT = 3.0
"""Where held-back cells are told apart without error, nothing else would keep the answer from certainty."""
MOST_SCORES = 10_000
"""Values of held-back cells that are kept: more tell nothing."""


class Stack(NamedTuple):
    """What cells that no part had learned from say about the parts."""

    weights: Float[np.ndarray, "part"]
    """Factors of the logits of the parts: what each is worth, and the temperature of all."""
    tilt: Float[np.ndarray, "type"]
    """Taken off the log-probabilities before the type is called: rare types are called more readily than they are probable."""
    strangeness: Float[np.ndarray, "held_back"]
    """1 - probability of the true type of held-back cells, ascending."""

    def log_probabilities(self, parts: Sequence[Float[np.ndarray, "cell type"]]) -> Float[np.ndarray, "cell type"]:
        """Calibrated."""
        return log_softmax(sum(weight * logits for weight, logits in zip(self.weights, parts, strict=True)), axis=1)

    def called(self, log_probabilities: Float[np.ndarray, "cell type"]) -> Int[np.ndarray, "cell"]:
        """Code of the type of every cell."""
        return np.argmax(log_probabilities - self.tilt, axis=1)

    def sets(self, log_probabilities: Float[np.ndarray, "cell type"], coverage: float) -> Bool[np.ndarray, "cell type"]:
        """Find the types that cannot be excluded: the true one is among them in a share `coverage` of new cells like the training cells.

        Conformal sets (Sadinle et al. 2019, LAC): all types that are as probable as the true type is in that share of held-back cells.
        A set may be empty: no type fits as well as that.
        """
        n = len(self.strangeness)
        rank = int(np.ceil((n + 1) * coverage))
        least = 1 - self.strangeness[rank - 1] if rank <= n else 0.0
        return np.exp(log_probabilities) >= least


class Abroad(NamedTuple):
    """What parts say of cells that differ from those that they learned from."""

    logits: Sequence[Float[np.ndarray, "some type"]]
    rows: Int[np.ndarray, "some"]
    """Which of the held-back cells."""


def fit_stack(
    parts: Sequence[Float[np.ndarray, "cell type"]],
    codes: Int[np.ndarray, "cell"],
    sizes: Int[np.ndarray, "type"],
    *,
    abroad: Abroad | None = None,
) -> Stack:
    """Weigh the parts by what they say of cells that they have not learned from.

    Parameters
    ----------
    parts
        Logits of held-back cells.
    codes
        Their types.
    sizes
        Training cells of every type.
    abroad
        Says, together with `parts`, what each part is worth beside the others; `parts` alone then how sure all of them may be.
    """
    stacked = np.stack(parts)
    weights = _weights(stacked, codes)
    if abroad is not None:
        both = np.concatenate([stacked, np.stack(abroad.logits)], axis=1)
        together = _weights(both, np.concatenate([codes, codes[abroad.rows]]))
        if together.any():  # else nothing holds there
            weights = together * _weights(np.tensordot(together, stacked, 1)[None], codes)
    logs = Stack(weights, np.zeros(len(sizes)), np.zeros(0)).log_probabilities(parts)
    rows = np.arange(len(codes))
    frequency = np.log(np.maximum(sizes, 1) / sizes.sum())
    strangeness = thinned(np.sort(1 - np.exp(logs[rows, codes])))
    return Stack(weights, _best_tilt(logs, codes, frequency) * frequency, strangeness)


def _weights(stacked: Float[np.ndarray, "part cell type"], codes: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "part"]:
    """Non-negative factors under which the true types are most probable."""
    n_cells, n_types = stacked.shape[1:]
    target = np.full((n_cells, n_types), 1 / (n_types * (n_cells + 1)))
    target[np.arange(n_cells), codes] += n_cells / (n_cells + 1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(np.tensordot(weights, stacked, 1), axis=1)
        gap = ((np.exp(logs) - target)[None] * stacked).sum(axis=(1, 2))
        return -smoothed(logs, codes), gap / n_cells

    n = len(stacked)
    found = minimize(loss, np.full(n, 1 / n), jac=True, method="L-BFGS-B", bounds=[(0, MOST_WEIGHT)] * n)
    return np.asarray(found.x)


def smoothed(logs: Float[np.ndarray, "cell type"], codes: Int[np.ndarray, "cell"]) -> float:
    """Mean log-probability of the true types, had one cell more, in equal parts, been of all types.

    So there is a best temperature also where all held-back cells are told apart and could not show how sure to be: the thought is Platt's
    (1999), whose one cell of each type would make small references of many types timid.
    """
    n_cells, n_types = logs.shape
    own = logs[np.arange(n_cells), codes].sum() * n_cells / (n_cells + 1)
    return float(own + logs.sum() / (n_types * (n_cells + 1))) / n_cells


def _best_tilt(logs: Float[np.ndarray, "cell type"], codes: Int[np.ndarray, "cell"], frequency: Float[np.ndarray, "type"]) -> float:
    """The tilt with the best macro-F1, which jumps from one to the next: averaged over neighbours."""
    scores = np.array([_macro_f1(codes, np.argmax(logs - tilt * frequency, axis=1), len(frequency)) for tilt in TILTS])
    padded = np.pad(scores, 1, mode="edge")
    return float(TILTS[np.argmax(padded[:-2] + padded[1:-1] + padded[2:])])


def _macro_f1(truth: Int[np.ndarray, "cell"], called: Int[np.ndarray, "cell"], n_types: int) -> float:
    right = np.bincount(truth[truth == called], minlength=n_types)
    n_true, n_called = np.bincount(truth, minlength=n_types), np.bincount(called, minlength=n_types)
    return float((2 * right / np.maximum(n_true + n_called, 1))[n_true > 0].mean())


def thinned(values: Float[np.ndarray, "value"]) -> Float[np.ndarray, "kept"]:
    """Ascending values of held-back cells, or evenly spaced ones where there are very many."""
    if len(values) <= MOST_SCORES:
        return values
    return values[np.linspace(0, len(values) - 1, MOST_SCORES).round().astype(int)]
