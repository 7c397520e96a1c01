"""Where the cells like a cell lie in every batch: the places that the anchor objective draws cell embeddings to."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

CELLS_PER_CLUSTER, MOST_CLUSTERS = 30, 100
LEAST_DEVIATION = 0.05
SOFTNESS = 0.1
"""Of the clusters, in units of the cosine distance."""
RIDGE = 0.2
"""Doubt about the offset of a batch in a cluster, in units of the cells that are expected there: few cells move little."""
ROUNDS, PASSES = 3, 5
"""Corrections, and passes over the cells of the clustering before each. More rounds take types apart where batches hardly differ."""
BLOCK = 0.05
"""Share of the cells that are assigned at once, before the counts of the clusters are brought up to date."""
APART = 0.95
"""Share of the neighbours that are of the cell's own batch, above which batches do not meet anywhere."""
MOST_REFERENCES = 4_000
"""Cells of a batch among which neighbours are sought: more make the search longer, not the mean of 50 neighbours better."""


def find_anchors(
    expression: sp.csr_array,
    batches: Int[np.ndarray, "cell"],
    *,
    n_components: int,
    strength: float,
    n_neighbours: int,
    smoothing: float,
    seed: int,
) -> Float[np.ndarray, "cell component"]:
    """Principal components of expression, without what batches add, drawn to the cells alike of all batches; of variance 1.

    Genes are divided by the root of their standard deviation: between leaving them as they are and giving all the same say. Being drawn
    together brings out what is left of the batches, which is taken out once more.

    Parameters
    ----------
    expression
        Log-normalised, of genes that vary within batches. Fewer components than asked for are filled up with zeros.
    smoothing
        Share of the neighbourhood in a cell's place; the rest is its own.
    """
    from sklearn.decomposition import PCA

    mean = np.asarray(expression.mean(axis=0)).reshape(-1)
    deviation = np.sqrt(np.maximum(np.asarray(expression.multiply(expression).mean(axis=0)).reshape(-1) - mean**2, 0))
    weighted = sp.csr_matrix(expression @ sp.diags_array((1 / np.sqrt(np.maximum(deviation, LEAST_DEVIATION))).astype(np.float32)))
    n = min(n_components, min(weighted.shape) - 1)
    components = PCA(n, svd_solver="covariance_eigh").fit_transform(weighted)
    free = aligned(components, batches, strength=strength, seed=seed)
    places = free
    if smoothing > 0:
        length = float(np.median(np.linalg.norm(free, axis=1)))
        alike = length * neighbourhoods(free, batches, n_neighbours=n_neighbours, seed=seed)
        places = aligned((1 - smoothing) * free + smoothing * alike, batches, strength=strength, seed=seed)
    found = np.zeros((len(places), n_components), np.float32)
    found[:, :n] = places / places.std()
    return found


def aligned(
    x: Float[np.ndarray, "cell component"], batches: Int[np.ndarray, "cell"], *, strength: float, seed: int
) -> Float[np.ndarray, "cell component"]:
    """Take out of each cell what its batch adds to the soft clusters that the cell is in.

    Clusters are drawn so that all batches take part in each as far as the cells allow, then the offset of every batch in every cluster is
    estimated and subtracted, in turns (the model of Korsunsky et al. 2019, "Harmony", eq. 4 to 14, written anew). Where batches do not meet
    anywhere, every cluster would be of one batch and nothing would move: there the first clusters are of cells less their batch's mean.

    Parameters
    ----------
    x
        Principal components.
    batches
        Codes from 0 on.
    strength
        How much a cluster that one batch dominates repels more of its cells (theta); 0: not at all.
    """
    n = len(x)
    n_batches = int(batches.max()) + 1
    n_clusters = int(np.clip(n // CELLS_PER_CLUSTER, 1, MOST_CLUSTERS))
    if n_batches < 2 or n_clusters < 2:
        return x.copy()
    rng = np.random.default_rng(seed)
    one_hot = np.eye(n_batches)[batches]
    corrected = np.array(x, np.float64)
    if _lie_apart(_directions(corrected), batches, rng):
        corrected -= ((one_hot.T @ corrected) / one_hot.sum(0)[:, None])[batches]
    centres = _first_centres(_directions(corrected), n_clusters, seed)
    for _ in range(ROUNDS):
        directions = _directions(corrected)
        shares, centres = _clustered(directions, centres, one_hot, strength, rng)
        moved = _without_offsets(np.asarray(x, np.float64), shares, one_hot)
        change = float(np.linalg.norm(moved - corrected)) / max(float(np.linalg.norm(moved)), 1e-12)
        corrected = moved
        if change < 1e-3:
            break
    return corrected.astype(np.float32)


def neighbourhoods(
    x: Float[np.ndarray, "cell component"], batches: Int[np.ndarray, "cell"], *, n_neighbours: int, seed: int
) -> Float[np.ndarray, "cell component"]:
    """Mean direction of the nearest cells of all batches together, each batch giving as many, near ones counting for more.

    How near is near is the distance of the cell's last neighbour in its own batch: of a batch that lacks the cell's type the neighbours
    are further away than that, and hardly count.
    """
    from sklearn.neighbors import NearestNeighbors

    directions = _directions(np.asarray(x, np.float64))
    rng = np.random.default_rng(seed)
    searches, reach = [], np.ones(len(x))
    for batch in np.unique(batches):
        members = np.flatnonzero(batches == batch)
        few = np.sort(rng.choice(members, min(len(members), MOST_REFERENCES), replace=False))
        search = NearestNeighbors(n_neighbors=min(n_neighbours, len(few)), algorithm="brute").fit(directions[few])
        reach[members] = np.maximum(search.kneighbors(directions[members])[0][:, -1], 1e-6)
        searches.append((few, search))
    total, weight = np.zeros_like(directions), np.zeros(len(x))
    for few, search in searches:
        distance, place = search.kneighbors(directions)
        share = np.exp(-((distance / reach[:, None]) ** 2))
        for k in range(place.shape[1]):
            total += share[:, k, None] * directions[few[place[:, k]]]
        weight += share.sum(1)
    return (total / weight[:, None]).astype(np.float32)


def _lie_apart(directions: np.ndarray, batches: Int[np.ndarray, "cell"], rng: np.random.Generator) -> bool:
    """Whether hardly a cell has neighbours of another batch."""
    from sklearn.neighbors import NearestNeighbors

    some = rng.permutation(len(directions))[:MOST_REFERENCES]
    of = batches[some]
    search = NearestNeighbors(n_neighbors=min(31, len(some)), algorithm="brute").fit(directions[some])
    place = search.kneighbors(directions[some[:1_000]], return_distance=False)[:, 1:]
    return bool((of[place] == of[:1_000, None]).mean() > APART)


def _directions(x: Float[np.ndarray, "cell component"]) -> Float[np.ndarray, "cell component"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _first_centres(directions: np.ndarray, n: int, seed: int) -> Float[np.ndarray, "cluster component"]:
    from sklearn.cluster import KMeans

    return _directions(KMeans(n, n_init=1, max_iter=25, random_state=seed).fit(directions).cluster_centers_)


def _clustered(
    directions: np.ndarray, centres: np.ndarray, one_hot: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "cell cluster"], Float[np.ndarray, "cluster component"]]:
    """Soft clusters of directions in which the batches are mixed."""
    size = one_hot.mean(0)
    shares = _softmax(directions @ centres.T)
    for _ in range(PASSES):
        centres = _directions(shares.T @ directions)
        near = np.exp(-2 * (1 - directions @ centres.T) / SOFTNESS)
        observed, expected = shares.T @ one_hot, np.outer(shares.sum(0), size)
        for block in np.array_split(rng.permutation(len(directions)), round(1 / BLOCK)):
            part, of_batch = shares[block], one_hot[block]
            observed -= part.T @ of_batch
            expected -= np.outer(part.sum(0), size)
            mixing = ((expected + 1) / (observed + 1)) ** strength
            part = near[block] * (of_batch @ mixing.T)
            part /= np.maximum(part.sum(1, keepdims=True), 1e-300)
            shares[block] = part
            observed += part.T @ of_batch
            expected += np.outer(part.sum(0), size)
    return shares, centres


def _softmax(similarity: np.ndarray) -> np.ndarray:
    shares = np.exp(-2 * (1 - similarity) / SOFTNESS)
    return shares / np.maximum(shares.sum(1, keepdims=True), 1e-300)


def _without_offsets(x: np.ndarray, shares: np.ndarray, one_hot: np.ndarray) -> Float[np.ndarray, "cell component"]:
    """Subtract the offset of each batch in each cluster, which a ridge estimates beside the cluster's own centre."""
    design = np.concatenate((np.ones((len(x), 1)), one_hot), 1)
    size = np.concatenate(([0.0], one_hot.mean(0)))
    corrected = x.copy()
    for share in shares.T:
        weighted = design * share[:, None]
        penalty = np.diag(RIDGE * share.sum() * size + 1e-9)
        offsets = np.linalg.solve(weighted.T @ design + penalty, weighted.T @ x)
        corrected -= weighted[:, 1:] @ offsets[1:]
    return corrected
