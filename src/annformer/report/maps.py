"""From a representation to two dimensions that can be drawn."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float


def umap(representation: Float[np.ndarray, "cell width"], *, seed: int = 0, n_neighbours: int = 15) -> Float[np.ndarray, "cell 2"]:
    """UMAP by scanpy, with the same settings for every representation."""
    import scanpy as sc

    cells = sc.AnnData(obsm={"X": representation})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # scanpy's own
        sc.pp.neighbors(cells, n_neighbors=min(n_neighbours, cells.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.umap(cells, random_state=seed)
    return np.asarray(cells.obsm["X_umap"], dtype=np.float32)
