"""What the scores of integration say of each cell: neighbours, clusters, silhouettes, the mixture around it."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from annformer.errors import input_error

K_GRAPH, K_KBET, K_LISI = 15, 50, 90
"""Neighbours, the cell itself among them, as scib-metrics' benchmark takes them."""
RESOLUTIONS = tuple(2 * step / 10 for step in range(1, 11))
N_COMPONENTS = 50
ALPHA = 0.05


class Neighbours(NamedTuple):
    """The nearest neighbours of every cell, nearest first; the first is the cell itself."""

    indices: Int[np.ndarray, "cell k"]
    distances: Float[np.ndarray, "cell k"]

    def first(self, k: int) -> Any:
        """The nearest `k` in the form that scib-metrics takes."""
        return _scib().nearest_neighbors.NeighborsResults(indices=self.indices[:, :k], distances=self.distances[:, :k])


def nearest(values: Float[np.ndarray, "cell width"], k: int) -> Neighbours:
    """Find them exactly; all others where there are fewer than `k`."""
    from sklearn.neighbors import NearestNeighbors

    n = len(values)
    distances, indices = NearestNeighbors(n_neighbors=min(k, n) - 1, algorithm="brute").fit(values).kneighbors()
    itself = np.arange(n)[:, None]
    return Neighbours(np.hstack([itself, indices]), np.hstack([np.zeros((n, 1)), distances]).astype(np.float32))


def clusters(
    values: Float[np.ndarray, "cell width"], near: Neighbours, label: Int[np.ndarray, "cell"], seed: int
) -> tuple[Int[np.ndarray, "cell"], str]:
    """Cluster at the resolution whose clusters tell most of the labels; k-means with as many clusters as labels without igraph."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    if find_spec("igraph") is None:
        k = len(np.unique(label))
        return KMeans(k, n_init=10, random_state=seed).fit_predict(values), f"k-means, k = {k}"
    graph = _graph(near)
    found = [_leiden(graph, resolution, seed) for resolution in RESOLUTIONS]
    best = int(np.argmax([normalized_mutual_info_score(label, each) for each in found]))
    return found[best], f"Leiden, resolution {RESOLUTIONS[best]:g}"


def silhouettes(values: Float[np.ndarray, "cell width"], group: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
    """Silhouette of every cell, in [-1, 1]."""
    from sklearn import config_context
    from sklearn.metrics import silhouette_samples

    if not len(values):
        return np.empty(0)
    with config_context(working_memory=128):
        return silhouette_samples(values.astype(np.float64), group)


def mixing(
    values: Float[np.ndarray, "cell width"], label: Int[np.ndarray, "cell"], batch: Int[np.ndarray, "cell"]
) -> Float[np.ndarray, "cell"]:
    """1 - |silhouette of the batch| among the cells of the label; NaN where the label has one batch only, or every cell another."""
    found = np.full(len(values), np.nan)
    for code in np.unique(label):
        rows = np.flatnonzero(label == code)
        if 1 < len(np.unique(batch[rows])) < len(rows):
            found[rows] = 1 - np.abs(silhouettes(values[rows], batch[rows]))
    return found


def connected(near: Neighbours, label: Int[np.ndarray, "cell"]) -> Bool[np.ndarray, "cell"]:
    """Whether the cell lies in its label's largest strongly connected part of the graph of neighbours of that label."""
    n = len(label)
    if not n:
        return np.empty(0, dtype=bool)
    other = near.indices[:, :K_GRAPH]
    start, end = np.repeat(np.arange(n), other.shape[1]), other.ravel()
    same = label[start] == label[end]
    graph = sp.csr_array((np.ones(same.sum()), (start[same], end[same])), shape=(n, n))
    _, part = sp.csgraph.connected_components(graph, connection="strong")
    size, of = np.bincount(part), np.empty(part.max() + 1, dtype=np.int64)
    of[part] = label
    largest = [max(np.flatnonzero(of == code), key=size.__getitem__) for code in np.unique(label)]
    return np.isin(part, largest)


def kbet_accepted(near: Neighbours, batch: Int[np.ndarray, "cell"]) -> Bool[np.ndarray, "cell"]:
    """Whether the batches of the neighbours have the proportions of the whole."""
    _, _, p = _scib().kbet(near.first(K_KBET), batch, alpha=ALPHA)
    return np.asarray(p) >= ALPHA


def effective_number(near: Neighbours, group: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
    """Effective number of groups around each cell (LISI)."""
    if not len(group):
        return np.empty(0)
    return np.asarray(_scib().lisi_knn(near.first(K_LISI), group), dtype=np.float64)


def components(values: Float[np.ndarray, "cell width"]) -> Float[np.ndarray, "cell component"]:
    """The first 50 principal components; a narrower representation is only centred, which spans the same."""
    from sklearn.decomposition import PCA

    wide = values.astype(np.float64)
    if min(values.shape) <= N_COMPONENTS:
        return wide - wide.mean(axis=0)
    return PCA(N_COMPONENTS, svd_solver="covariance_eigh").fit_transform(wide)


def _graph(near: Neighbours) -> Any:
    import igraph

    weights = near.first(K_GRAPH).knn_graph_connectivities
    # symmetric weights are read as both directions of an edge and then joined, as scib-metrics and scanpy do
    graph = igraph.Graph.Weighted_Adjacency(weights, mode="directed")
    graph.to_undirected(mode="each")
    return graph


def _leiden(graph: Any, resolution: float, seed: int) -> Int[np.ndarray, "cell"]:
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden(objective_function="modularity", weights="weight", resolution=resolution)
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(found.membership)


def _scib() -> Any:
    """scib-metrics, which takes seconds to import and is an extra."""
    try:
        import scib_metrics
    except ModuleNotFoundError as error:
        found = f"the scores of integration need scib-metrics, which is not installed ({error.name} is missing)"
        raise input_error(found, "the extra `evaluate`", "pip install 'annformer[evaluate]'") from error
    return scib_metrics
