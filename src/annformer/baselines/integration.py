"""What a table of integration must not go without: PCA, Harmony and scVI in their ordinary variants."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float

from annformer.baselines._packages import quietly, require
from annformer.baselines.expression import Counts, Names, highly_variable, log_normalised, scaled
from annformer.baselines.pca import pca_embedding

N_GENES = 2_000
BATCH_SIZE, SMALLEST_BATCH = 128, 3
"""scvi-tools' own; a smaller last batch would not do for its normalisation over the batch."""


def _pca(
    counts: Counts,
    batches: Names,
    *,
    seed: int,
    genes: str,
    scale: bool = False,
) -> Float[np.ndarray, "cell width"]:
    values = log_normalised(counts)
    if genes == "HVG":
        values = values[:, highly_variable(counts, batches, N_GENES).genes]
    return pca_embedding(scaled(values) if scale else values, seed=seed)


def _harmony(
    counts: Counts,
    batches: Names,
    *,
    seed: int,
    genes: str,
    scale: bool = False,
    ridge: float | None = None,
) -> Float[np.ndarray, "cell width"]:
    """Harmony's second version chooses a penalty for each cluster; the first had 1 for all, and is still in many a pipeline."""
    require("Harmony")
    import harmonypy

    before = _pca(counts, batches, seed=seed, genes=genes, scale=scale)
    cells = pd.DataFrame({"batch": np.asarray(batches, dtype=str)})
    found = harmonypy.run_harmony(before, cells, ["batch"], lamb=ridge, random_state=seed, verbose=False)
    after = np.asarray(found.Z_corr, dtype=np.float32)
    assert after.shape == before.shape
    return after


def _scvi(
    counts: Counts,
    batches: Names,
    *,
    seed: int,
    max_epochs: int | None = None,
) -> Float[np.ndarray, "cell width"]:
    """The defaults of scvi-tools: ZINB, and as many epochs as its own rule for the number of cells says."""
    require("scVI")
    import anndata as ad
    import torch
    from scvi.model import SCVI

    chosen = sp.csr_matrix(counts)[:, highly_variable(counts, batches, N_GENES).genes]
    cells = ad.AnnData(chosen, obs=pd.DataFrame({"batch": np.asarray(batches, dtype=str)}, index=np.arange(chosen.shape[0]).astype(str)))
    with quietly("scvi", "lightning.pytorch", "lightning.fabric"), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the number of workers, and of expected counts, which are not whole numbers
        torch.manual_seed(seed)
        SCVI.setup_anndata(cells, batch_key="batch")
        model = SCVI(cells)
        model.train(
            max_epochs=max_epochs,
            datasplitter_kwargs={"external_indexing": _split(cells.n_obs, seed)},
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        return np.asarray(model.get_latent_representation(), dtype=np.float32)


def _split(n_cells: int, seed: int) -> list[np.ndarray]:
    """Hold back a tenth, as scvi-tools does; it would draw them from a seed of the whole process."""
    order = np.random.default_rng(seed).permutation(n_cells)
    n_held = max(n_cells // 10, 1)
    last = (n_cells - n_held) % BATCH_SIZE
    n_held += last if last < SMALLEST_BATCH else 0
    return [np.sort(order[n_held:]), np.sort(order[:n_held])]


INTEGRATION: dict[str, Callable[..., Float[np.ndarray, "cell width"]]] = {
    "PCA all genes": partial(_pca, genes="all"),
    "PCA HVG": partial(_pca, genes="HVG"),
    "PCA HVG scaled": partial(_pca, genes="HVG", scale=True),
    "Harmony all genes": partial(_harmony, genes="all"),
    "Harmony HVG": partial(_harmony, genes="HVG"),
    "Harmony HVG scaled": partial(_harmony, genes="HVG", scale=True),
    "Harmony HVG, ridge 1": partial(_harmony, genes="HVG", ridge=1.0),
    "Harmony HVG scaled, ridge 1": partial(_harmony, genes="HVG", scale=True, ridge=1.0),
    "scVI HVG": _scvi,
}
"""Name -> function(counts, batches, *, seed) -> cells in rows; 2,000 highly variable genes, 50 components, the packages' defaults.

PCA and Harmony take seconds for 10,000 cells, scVI many minutes on a CPU; `max_epochs` of scVI shortens it.
"""
