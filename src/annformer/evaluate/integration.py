"""How well a representation keeps cell types apart and mixes their batches: scib's scores, ready for a bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from annformer.errors import input_error
from annformer.evaluate import _integration_cells as cells
from annformer.evaluate._integration_parts import IntegrationParts as IntegrationParts
from annformer.evaluate.contingency import contingency_table

Names = Sequence[str] | np.ndarray | pd.Series
"""A name for each cell."""

UNLABELLED = tuple(spelt for word in ("unlabelled", "unknown", "unlabeled") for spelt in (word, word.capitalize(), word.upper()))
"""Labels that say that there is none, as does a missing value."""

DEFINITIONS: dict[str, str] = {
    "nmi": "normalised mutual information of clusters and labels; Leiden clusters on the graph of 15 nearest neighbours, at the one of ten "
    "resolutions from 0.2 to 2.0 that makes it largest (the same search for every method)",
    "ari": "adjusted Rand index of the same clusters and the labels",
    "asw_label": "mean silhouette of the labels, moved from [-1, 1] to [0, 1]",
    "avg_bio": "mean of nmi, ari and asw_label",
    "graph_connectivity": "share of a label's cells in its largest strongly connected part of the graph of 15 nearest neighbours, "
    "mean over the labels",
    "asw_batch": "1 - |silhouette of the batches within a label|, mean over its cells and then over the labels with several batches",
    "avg_batch": "mean of graph_connectivity and asw_batch",
    "overall": "0.6 avg_bio + 0.4 avg_batch",
    "pcr": "1 - share of the variance of the first 50 principal components that the batch explains",
    "kbet": "share of cells whose 50 nearest neighbours have the batches in the proportions of the whole (chi-square test, p >= 0.05)",
    "ilisi": "median effective number of batches among 90 neighbours, scaled: 0 is one batch, 1 is all of them evenly",
    "clisi": "median effective number of labels among 90 neighbours, scaled: 1 is one label, 0 is all of them evenly",
}
"""What each score is. All lie between 0 and 1 (ari may fall below 0), more is better; a cell counts as its own neighbour."""


def integration_parts(
    representation: Float[np.ndarray, "cell width"],
    labels: Names | None,
    batches: Names,
    *,
    seed: int = 0,
) -> IntegrationParts:
    """Find clusters, neighbours, silhouettes and the rest of what the scores need; seconds for 10,000 cells, memory grows with cells.

    Parameters
    ----------
    representation
        Cells in rows.
    labels
        Cell types. Cells without one ("unlabelled", "unknown", missing) take no part in what needs labels, not even as neighbours.
    batches
        One per cell, at least two different ones.
    seed
        Of the clustering.
    """
    values = np.ascontiguousarray(representation, dtype=np.float32)
    batch, batch_names = _codes(batches, "batch")
    label, label_names = _label_codes(labels, len(batch))
    _check(values, batch, label_names if labels is not None else None)
    known = np.flatnonzero(label >= 0)
    some, of, theirs = values[known], label[known], batch[known]
    around = cells.nearest(values, cells.K_LISI)
    near = around if len(known) in (0, len(values)) else cells.nearest(some, cells.K_LISI)
    clusters, clustering = cells.clusters(some, near, of, seed) if len(known) else (of, "none")
    return IntegrationParts(
        label_names=label_names,
        batch_names=batch_names,
        label=label,
        batch=batch,
        cluster=_spread(clusters, known, len(values), -1),
        clustering=clustering,
        silhouette_label=_spread(cells.silhouettes(some, of), known, len(values), np.nan),
        silhouette_batch=_spread(cells.mixing(some, of, theirs), known, len(values), np.nan),
        connected=_spread(cells.connected(near, of), known, len(values), False),  # noqa: FBT003  (a value to fill in)
        kbet=cells.kbet_accepted(around, batch),
        ilisi=(cells.effective_number(around, batch) - 1) / (len(batch_names) - 1),
        clisi=_spread(_clisi(near, of, len(label_names)), known, len(values), np.nan),
        components=cells.components(values),
    )


def integration_scores(
    representation: Float[np.ndarray, "cell width"],
    labels: Names | None,
    batches: Names,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a representation in one row, with the columns of `DEFINITIONS`; the arguments are those of `integration_parts`."""
    return pd.DataFrame([integration_parts(representation, labels, batches, seed=seed).scores()])


def per_label_scores(parts: IntegrationParts) -> pd.DataFrame:
    """Score every label.

    Returns
    -------
    One row per label: `label`, `n` cells, `n_batches`, mean `silhouette` (in [-1, 1]), `asw_batch` (NaN where there is one batch),
    `connected` (share of cells in the label's largest connected part), `cluster_f1` of the cluster that fits the label best.
    """
    known = parts.labelled
    shape = (len(parts.label_names), parts.n_clusters)
    table = contingency_table(parts.label[known], parts.cluster[known], np.ones(len(known)), shape)
    f1 = 2 * table / (table.sum(axis=0, keepdims=True) + table.sum(axis=1, keepdims=True))
    cells_of = pd.DataFrame(
        {
            "label": parts.label[known],
            "batch": parts.batch[known],
            "silhouette": parts.silhouette_label[known],
            "asw_batch": parts.silhouette_batch[known],
            "connected": parts.connected[known].astype(np.float64),
        }
    ).groupby("label")
    found = cells_of.agg(n=("batch", "size"), n_batches=("batch", "nunique"))
    found = found.join(cells_of[["silhouette", "asw_batch", "connected"]].mean())
    found.insert(0, "label", np.asarray(parts.label_names, dtype=object)[found.index])
    return found.assign(cluster_f1=f1.max(axis=1)).reset_index(drop=True)


def _codes(values: Names, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    codes, names = pd.factorize(pd.Series(np.asarray(values, dtype=object)), sort=True)
    if (codes < 0).any():
        found = f"{int((codes < 0).sum())} of {len(codes)} cells have no {what}"
        raise input_error(found, f"a {what} for every cell", "drop these cells or give them one")
    return codes.astype(np.int64), tuple(map(str, names))


def _label_codes(labels: Names | None, n: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if labels is None:
        return np.full(n, -1), ()
    given = pd.Series(np.asarray(labels, dtype=object))
    codes, names = pd.factorize(given.mask(given.isin(UNLABELLED)), sort=True)
    return codes.astype(np.int64), tuple(map(str, names))


def _check(values: np.ndarray, batch: np.ndarray, label_names: tuple[str, ...] | None) -> None:
    assert len(values) == len(batch), "representation and batches have different numbers of cells"
    if not np.isfinite(values).all():
        found = f"{int((~np.isfinite(values)).any(axis=1).sum())} of {len(values)} cells of the representation have NaN or infinite values"
        raise input_error(found, "finite numbers", "see why the method gave none; drop these cells for all methods alike")
    if batch.max() == 0:
        found = "all cells are of one batch"
        raise input_error(found, "two batches at least", "name the column of the batches; one batch needs no integration")
    if label_names is not None and len(label_names) < 2:
        found = f"the labels name {len(label_names)} cell type(s)"
        raise input_error(found, "two cell types at least", "give labels=None for the scores that need no labels")


def _clisi(near: cells.Neighbours, label: np.ndarray, n_labels: int) -> np.ndarray:
    return (n_labels - cells.effective_number(near, label)) / (n_labels - 1) if n_labels else np.empty(0)


def _spread(values: np.ndarray, rows: np.ndarray, n: int, other: float | bool) -> np.ndarray:  # noqa: FBT001  (a value to fill in)
    """Values of some cells, among all of them."""
    full = np.full(n, other, dtype=values.dtype)
    full[rows] = values
    return full
