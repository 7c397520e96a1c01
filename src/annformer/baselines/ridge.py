"""Ridge regression of the asked genes on the visible ones: the floor under every prediction of expression from expression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from annformer.baselines.gene_mean import gene_means


class VisibleGeneRidge:
    """One ridge regression for every gene, from the genes of the cell that are visible.

    A cell's input has two numbers for each gene: its value less the gene's mean, divided by the standard deviation of all such differences,
    and 1 for "is visible"; both are 0 where the gene is not visible, and all are divided by the root of the number of visible genes. The
    inputs are projected on their first singular vectors, z. Gene g is predicted as m_g + w_g . z, where m_g is its smoothed mean and
    w_g minimises, over the training cells in which g was asked, the sum of (value - m_g - w_g . z)^2 plus strength x |w_g|^2.

    Hide in training what will be hidden later, by the same rule: the inputs of a cell must not hold what it is asked for.

    Parameters
    ----------
    ranks
        Numbers of singular vectors that are kept, to choose from together with the penalty, by the squared error on held-out cells.
    strengths
        Penalties to choose from.
    smoothing
        Observations at the mean of all that are added to each gene before its own mean is taken.
    n_cells_svd
        Most cells of which the singular vectors are computed.
    seed
        Choice of these cells, start of the solver.
    """

    def __init__(
        self,
        *,
        ranks: Sequence[int] = (128,),
        strengths: Sequence[float] = (30.0,),
        smoothing: float = 3.0,
        n_cells_svd: int = 4_000,
        seed: int = 0,
    ) -> None:
        self.ranks = ranks
        self.strengths = strengths
        self.smoothing = smoothing
        self.n_cells_svd = n_cells_svd
        self.seed = seed

    def fit(self, visible: sp.csr_array, asked: sp.csr_array, *, held_out: tuple[sp.csr_array, sp.csr_array] | None = None) -> Self:
        """Learn all genes.

        Parameters
        ----------
        visible
            cell x gene; stored are the values of the visible genes.
        asked
            cell x gene; stored are the values of the genes to predict.
        held_out
            The same of other cells, to choose among several ranks and strengths.
        """
        assert len(self.ranks) * len(self.strengths) == 1 or held_out is not None, "a choice needs held-out cells"
        ids, values = np.concatenate([visible.indices, asked.indices]), np.concatenate([visible.data, asked.data])
        self.means_ = gene_means(ids, values, visible.shape[1], smoothing=self.smoothing)
        self.scale_ = float(np.sqrt(np.mean((values - self.means_[ids]) ** 2))) or 1.0
        self.components_ = self._singular_vectors(self._inputs(visible))
        z = self._project(visible)
        z_held, asked_held = (z[:0], asked[:0]) if held_out is None else (self._project(held_out[0]), held_out[1])
        self.errors_: dict[tuple[int, float], float] = {}
        for rank in self.ranks:
            weights = self._weights(z[:, :rank], asked)
            errors = self._errors(weights, z_held[:, :rank], asked_held)
            best = int(errors.argmin())
            if errors[best] < min(self.errors_.values(), default=np.inf):
                self.weights_, self.rank_, self.strength_ = weights[best], weights.shape[2], self.strengths[best]
            self.errors_ |= {(rank, strength): float(error) for strength, error in zip(self.strengths, errors, strict=True)}
        self.components_ = np.ascontiguousarray(self.components_[:, : self.rank_])
        return self

    def _weights(self, z: Float[np.ndarray, "cell component"], asked: sp.csr_array) -> Float[np.ndarray, "strength gene component"]:
        weights = np.zeros((len(self.strengths), asked.shape[1], z.shape[1]), dtype=np.float32)
        for gene, cells, found in _by_gene(asked):
            if len(cells):
                weights[:, gene] = _solve(z[cells], found - self.means_[gene], self.strengths)
        return weights

    def _errors(
        self, weights: Float[np.ndarray, "strength gene component"], z: Float[np.ndarray, "cell component"], asked: sp.csr_array
    ) -> Float[np.ndarray, "strength"]:
        """Mean squared error of each strength at asked genes."""
        errors = np.zeros(len(weights))
        for gene, cells, found in _by_gene(asked):
            errors += (((found - self.means_[gene])[:, None] - z[cells] @ weights[:, gene].T) ** 2).sum(axis=0)
        return errors / max(asked.nnz, 1)

    def predict(
        self, visible: sp.csr_array, cells: Int[np.ndarray, "asked"], genes: Int[np.ndarray, "asked"]
    ) -> Float[np.ndarray, "asked"]:
        """Predict `genes[i]` of cell `cells[i]`, a row of `visible`."""
        z = self._project(visible)
        said = np.empty(len(cells))
        for first in range(0, len(cells), 65_536):
            some = slice(first, first + 65_536)
            said[some] = np.einsum("ij,ij->i", z[cells[some]], self.weights_[genes[some]])
        return self.means_[genes] + said

    def _inputs(self, visible: sp.csr_array) -> sp.csr_array:
        n = np.diff(visible.indptr)
        each = np.repeat(1 / np.sqrt(np.maximum(n, 1)), n).astype(np.float32)
        centred = ((visible.data - self.means_[visible.indices]) / self.scale_).astype(np.float32)
        parts = [sp.csr_array((data, visible.indices, visible.indptr), shape=visible.shape) for data in (centred * each, each)]
        return sp.csr_array(sp.hstack(parts, format="csr"))

    def _singular_vectors(self, inputs: sp.csr_array) -> Float[np.ndarray, "input component"]:
        from sklearn.utils.extmath import randomized_svd

        rng = np.random.default_rng(self.seed)
        n_cells = inputs.shape[0]
        some = np.sort(rng.permutation(n_cells)[: self.n_cells_svd])
        rank = min(max(self.ranks), len(some), inputs.shape[1])
        _, _, vectors = randomized_svd(inputs[some], rank, n_iter=2, random_state=self.seed)
        return np.ascontiguousarray(vectors.T, dtype=np.float32)

    def _project(self, visible: sp.csr_array) -> Float[np.ndarray, "cell component"]:
        return np.asarray(self._inputs(visible) @ self.components_)


def _by_gene(values: sp.csr_array) -> Iterator[tuple[int, Int[np.ndarray, "cell"], Float[np.ndarray, "cell"]]]:
    """Every gene with the cells that have it, and its values there."""
    columns = values.tocsc()
    for gene, (first, last) in enumerate(zip(columns.indptr[:-1], columns.indptr[1:], strict=True)):
        yield gene, columns.indices[first:last], columns.data[first:last]


def _solve(
    z: Float[np.ndarray, "cell component"], y: Float[np.ndarray, "cell"], strengths: Sequence[float]
) -> Float[np.ndarray, "strength component"]:
    """Ridge weights for each strength, from whichever of the two systems of equations is smaller."""
    from scipy.linalg import solve

    dual = len(y) < z.shape[1]
    matrix = (z @ z.T if dual else z.T @ z).astype(np.float64)
    right = y if dual else z.T @ y
    diagonal = np.einsum("ii->i", matrix)
    found, added = [], 0.0
    for strength in strengths:
        diagonal += strength - added
        added = strength
        found.append(solve(matrix, right, assume_a="pos", check_finite=False))
    return np.stack([z.T @ weights if dual else weights for weights in found])
