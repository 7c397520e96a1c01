"""How well the geometry of a representation agrees with labels that nobody showed it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pandas as pd
from jaxtyping import Float, Int


def clustering_scores(
    representation: Float[np.ndarray, "cell width"], labels: Sequence[str] | np.ndarray, *, resolution: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Score one representation in one row.

    Columns: `method` and `n_clusters` of the clustering, `nmi` and `ari` of its clusters against the labels, `silhouette` of the labels
    (in [-1, 1]), and `avg_bio`, the mean of NMI, ARI and (silhouette + 1) / 2.

    Clusters are Leiden's at `resolution` where igraph is installed (extra `cluster`), else k-means with as many clusters as labels.
    Nothing is tuned to the labels.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    truth = np.asarray(labels, dtype=str)
    method, clusters = cluster(representation, n_clusters=len(np.unique(truth)), resolution=resolution, seed=seed)
    nmi, ari = normalized_mutual_info_score(truth, clusters), adjusted_rand_score(truth, clusters)
    silhouette = silhouette_score(representation, truth)
    scores = {"nmi": nmi, "ari": ari, "silhouette": silhouette, "avg_bio": (nmi + ari + (silhouette + 1) / 2) / 3}
    return pd.DataFrame([{"method": method, "n_clusters": len(np.unique(clusters)), **scores}])


def cluster(
    representation: Float[np.ndarray, "cell width"], *, n_clusters: int, resolution: float = 1.0, seed: int = 0
) -> tuple[str, Int[np.ndarray, "cell"]]:
    """Cluster the cells; say by which method."""
    if find_spec("igraph") is not None:
        return f"Leiden, resolution {resolution:g}", _leiden(representation, resolution, seed)
    from sklearn.cluster import KMeans

    return f"k-means, k = {n_clusters}", KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(representation)


def _leiden(representation: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    import anndata as ad
    import scanpy as sc

    cells = ad.AnnData(obsm={"X": representation})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # scanpy's own
        sc.pp.neighbors(cells, n_neighbors=min(15, cells.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.leiden(cells, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return cells.obs["leiden"].cat.codes.to_numpy()
