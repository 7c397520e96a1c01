"""Predict each gene's mean: the floor under every prediction of expression."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def gene_means(gene_ids: Int[np.ndarray, "token"], values: Float[np.ndarray, "token"], n_genes: int) -> Float[np.ndarray, "gene"]:
    """Mean of the values met at each gene; a gene that was never met gets the mean of all."""
    met = np.bincount(gene_ids, minlength=n_genes)
    total = np.bincount(gene_ids, weights=values, minlength=n_genes)
    return np.where(met > 0, total / np.maximum(met, 1), values.mean())
