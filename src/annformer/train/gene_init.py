"""What the rows of the gene table start from."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, diags_array, vstack
from torch import Tensor

from annformer.baselines.expression import log_normalised
from annformer.data.random_cells import RandomCells
from annformer.model.profile import SHARE, ExpressionProfile
from annformer.scgpt import ScGPT
from annformer.tokens import CellBatch

_CELLS = 50_000
"""Cells that a decomposition looks at: more do not turn its axes."""
_LEAST_DEVIATION = 0.05
"""Genes are divided by their standard deviation, but not by less: else the rarest would be the loudest."""


def co_expression(
    cells: RandomCells, rows: Int[np.ndarray, "cell"], n_tokens: int, width: int, *, seed: int
) -> Float[np.ndarray, "token width"]:
    """Place genes by the cells that express them: right singular vectors of standardised log expression, times the roots of the values.

    The first axis, on which cells differ by how much of everything they express, is left out. Genes that no cell expresses get zeros.
    """
    x = _some_expression(cells, rows, n_tokens, seed=seed)
    axes, values = axes_of_variation(x, width, seed=seed)
    placed = np.zeros((n_tokens, width), np.float32)
    placed[:, : len(values)] = axes * np.sqrt(values)
    return placed


def _some_expression(cells: RandomCells, rows: Int[np.ndarray, "cell"], n_tokens: int, *, seed: int) -> csr_array:
    """Log-normalised expression of at most `_CELLS` of the cells, with a column for every token of the vocabulary."""
    rng = np.random.default_rng([seed, 2])
    some = np.sort(rng.choice(rows, min(len(rows), _CELLS), replace=False))
    return vstack([token_expression(cells.rows(some[first : first + 512]), n_tokens) for first in range(0, len(some), 512)], format="csr")


def token_expression(cells: CellBatch, n_tokens: int) -> csr_array:
    """Log-normalised expression of cells, with a column for every token of the vocabulary."""
    x = log_normalised(cells.counts)
    return csr_array((x.data, cells.gene_ids[x.indices], x.indptr), shape=(x.shape[0], n_tokens))


def axes_of_variation(x: csr_array, n: int, *, seed: int) -> tuple[Float[np.ndarray, "token axis"], Float[np.ndarray, "axis"]]:
    """Right singular vectors and singular values of expression, genes standardised, without the first; as many as there are up to `n`."""
    from sklearn.utils.extmath import randomized_svd

    mean = x.mean(axis=0)
    deviation = np.sqrt(np.maximum(x.multiply(x).mean(axis=0) - mean**2, 0))
    standardised = x @ diags_array((1 / np.maximum(deviation, _LEAST_DEVIATION)).astype(np.float32))
    _, values, axes = randomized_svd(standardised, min(n + 1, min(x.shape) - 1), random_state=seed)
    return axes[1:].T, values[1:]


def principal_axes(
    cells: RandomCells, rows: Int[np.ndarray, "cell"], n_tokens: int, n_axes: int, *, seed: int
) -> tuple[Float[np.ndarray, "token axis"], Float[np.ndarray, "token"]]:
    """Principal axes of log expression, genes not scaled, and its mean; as many axes as cells and genes allow, up to `n_axes`.

    The axes are divided by the root mean square length of a cell along all of them.
    """
    from sklearn.decomposition import PCA

    x = _some_expression(cells, rows, n_tokens, seed=seed)
    found = PCA(min(n_axes, min(x.shape) - 1), svd_solver="arpack", random_state=seed).fit(x)
    axes = found.components_.T / np.sqrt(found.explained_variance_.sum())
    return axes.astype(np.float32), np.asarray(x.mean(axis=0), np.float32).reshape(-1)


@torch.no_grad()
def start_profile_at(profile: ExpressionProfile, axes: Float[np.ndarray, "token axis"], mean: Float[np.ndarray, "token"]) -> None:
    """Let the profile say where cells lie on the axes, as loud as `<cls>` is after its normalisation."""
    width = profile.gene.weight.shape[1]
    directions = np.zeros((len(axes), width), np.float32)
    directions[:, : axes.shape[1]] = axes * np.sqrt(width)
    profile.gene.weight.copy_(torch.from_numpy(directions / SHARE))
    profile.origin.copy_(torch.from_numpy(-(mean @ directions)))


@torch.no_grad()
def start_genes_at(model: ScGPT, placed: Float[np.ndarray, "token width"]) -> None:
    """Give the gene rows the directions of `placed` and the length that random ones have; rows of zeros stay random."""
    weight = model.encoder.gene.weight
    rows = torch.from_numpy(placed)
    length = rows.norm(dim=1, keepdim=True)
    typical = weight.norm(dim=1).mean()
    weight.copy_(torch.where(length > 0, rows / length.clamp(min=1e-12) * typical, weight))


@torch.no_grad()
def settle_untrained(model: ScGPT, trained: Bool[np.ndarray, "token"]) -> None:
    """Give genes that were never met the mean of the others: a gene about which nothing is known, and not a random one; no direction."""
    mask = torch.tensor(trained)
    weight: Tensor = model.encoder.gene.weight
    weight[~mask] = weight[mask].mean(0)
    if model.encoder.profile is not None:
        model.encoder.profile.gene.weight[~mask] = 0
