"""Predict each gene's mean: the floor under every prediction of expression."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def gene_means(
    gene_ids: Int[np.ndarray, "token"], values: Float[np.ndarray, "token"], n_genes: int, *, smoothing: float = 0.0
) -> Float[np.ndarray, "gene"]:
    """Mean of the values met at each gene; a gene that was never met gets the mean of all.

    Parameters
    ----------
    smoothing
        Observations at the mean of all that are added to each gene, so that a gene met once or twice does not get an extreme mean.
    """
    met = np.bincount(gene_ids, minlength=n_genes) + smoothing
    total = np.bincount(gene_ids, weights=values, minlength=n_genes) + smoothing * values.mean()
    return np.where(met > 0, total / np.maximum(met, 1e-12), values.mean())
