"""What the rows of the gene table start from."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, diags_array, vstack
from torch import Tensor

from annformer.data.random_cells import RandomCells
from annformer.scgpt import ScGPT

_CELLS = 50_000
"""Cells that a decomposition looks at: more do not turn its axes."""
_LEAST_DEVIATION = 0.05
"""Genes are divided by their standard deviation, but not by less: else the rarest would be the loudest."""
_TARGET_SUM = 1e4


def co_expression(
    cells: RandomCells, rows: Int[np.ndarray, "cell"], n_tokens: int, width: int, *, seed: int
) -> Float[np.ndarray, "token width"]:
    """Place genes by the cells that express them: right singular vectors of standardised log expression, times the roots of the values.

    The first axis, on which cells differ by how much of everything they express, is left out. Genes that no cell expresses get zeros.
    """
    from sklearn.utils.extmath import randomized_svd

    rng = np.random.default_rng([seed, 2])
    some = np.sort(rng.choice(rows, min(len(rows), _CELLS), replace=False))
    x = vstack([_log_expression(cells, some[first : first + 512], n_tokens) for first in range(0, len(some), 512)], format="csr")
    mean = x.mean(axis=0)
    deviation = np.sqrt(np.maximum(x.multiply(x).mean(axis=0) - mean**2, 0))
    x = x @ diags_array((1 / np.maximum(deviation, _LEAST_DEVIATION)).astype(np.float32))
    n = min(width + 1, min(x.shape) - 1)
    _, values, axes = randomized_svd(x, n, random_state=seed)
    placed = np.zeros((n_tokens, width), np.float32)
    placed[:, : n - 1] = (axes.T * np.sqrt(values))[:, 1:]
    return placed


def _log_expression(cells: RandomCells, rows: Int[np.ndarray, "cell"], n_tokens: int) -> csr_array:
    batch = cells.rows(rows)
    counts = batch.counts.astype(np.float32)
    totals = np.maximum(counts.sum(axis=1), 1e-12)
    data = np.log1p(counts.data * np.repeat(_TARGET_SUM / totals, np.diff(counts.indptr))).astype(np.float32)
    return csr_array((data, batch.gene_ids[counts.indices], counts.indptr), shape=(len(rows), n_tokens))


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
    """Give genes that were never met the mean of the others: a gene about which nothing is known, and not a random one."""
    mask = torch.tensor(trained)
    weight: Tensor = model.encoder.gene.weight
    weight[~mask] = weight[mask].mean(0)
