"""What the scores of integration are made of, cell by cell, and the scores of any choice of cells."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from annformer.evaluate.contingency import adjusted_rand_index, contingency_table, normalised_mutual_information

LABEL_SCORES = ("nmi", "ari", "asw_label", "avg_bio", "graph_connectivity", "asw_batch", "avg_batch", "overall")


@dataclass(frozen=True)
class IntegrationParts:
    """What the scores are made of, cell by cell: clusters and neighbours are found once, a bootstrap only counts cells anew.

    Attributes
    ----------
    label_names, batch_names
        In the order of their codes.
    label, cluster
        Codes; -1 where the cell has no label.
    batch
        Codes.
    clustering
        How the clusters were found, with the resolution.
    silhouette_label
        In [-1, 1]; NaN without a label.
    silhouette_batch
        1 - |silhouette of the batch among the cells of the label|; NaN where the label has one batch, or no batch twice.
    connected
        Whether the cell lies in the largest connected part of its label.
    kbet
        Whether the batches around the cell have the proportions of the whole.
    ilisi, clisi
        Effective number of batches or labels around the cell, scaled to [0, 1], more is better; clisi is NaN without a label.
    components
        The first 50 principal components.
    """

    label_names: tuple[str, ...]
    batch_names: tuple[str, ...]
    label: Int[np.ndarray, "cell"]
    batch: Int[np.ndarray, "cell"]
    cluster: Int[np.ndarray, "cell"]
    clustering: str
    silhouette_label: Float[np.ndarray, "cell"]
    silhouette_batch: Float[np.ndarray, "cell"]
    connected: Bool[np.ndarray, "cell"]
    kbet: Bool[np.ndarray, "cell"]
    ilisi: Float[np.ndarray, "cell"]
    clisi: Float[np.ndarray, "cell"]
    components: Float[np.ndarray, "cell component"]

    def scores(self, rows: Int[np.ndarray, "row"] | None = None) -> dict[str, float]:
        """Every score of `DEFINITIONS`; without labels those that need none. NaN where none of the rows has what a score needs.

        Parameters
        ----------
        rows
            The cells to score, one as often as it is named: a bootstrap draw. Clusters and neighbours stay those of all cells.
        """
        n = len(self.batch)
        weight = np.ones(n) if rows is None else np.bincount(rows, minlength=n).astype(np.float64)
        found = self.label_scores(weight) if self.label_names else {}
        found["pcr"] = 1 - _explained(self.components, self._batches, weight)
        found["kbet"] = float(self.kbet @ weight / weight.sum())
        found["ilisi"] = _median(self.ilisi, self._by_ilisi, weight)
        if self.label_names:
            found["clisi"] = _median(self.clisi, self._by_clisi, weight)
        return found

    def label_scores(self, weight: Float[np.ndarray, "cell"]) -> dict[str, float]:
        """Those up to "overall", a cell counting as often as its weight says: quick, for a bootstrap. NaN where no labelled cell counts."""
        known = self.labelled
        label, weight = self.label[known], weight[known]
        if not weight.any():
            return dict.fromkeys(LABEL_SCORES, float("nan"))
        table = contingency_table(label, self.cluster[known], weight, (len(self.label_names), self.n_clusters))
        nmi, ari = normalised_mutual_information(table), adjusted_rand_index(table)
        asw_label = (float(self.silhouette_label[known] @ weight / weight.sum()) + 1) / 2
        avg_bio = (nmi + ari + asw_label) / 3
        connectivity = _mean_of_means(self.connected[known].astype(np.float64), label, weight)
        asw_batch = _mean_of_means(self.silhouette_batch[known], label, weight)
        avg_batch = (connectivity + asw_batch) / 2
        bio = {"nmi": nmi, "ari": ari, "asw_label": asw_label, "avg_bio": avg_bio}
        mixing = {"graph_connectivity": connectivity, "asw_batch": asw_batch, "avg_batch": avg_batch}
        return {**bio, **mixing, "overall": 0.6 * avg_bio + 0.4 * avg_batch}

    @cached_property
    def labelled(self) -> Int[np.ndarray, "labelled"]:
        """Rows of the cells with a label."""
        return np.flatnonzero(self.label >= 0)

    @cached_property
    def n_clusters(self) -> int:
        """Clusters that were found."""
        return int(self.cluster.max()) + 1

    @cached_property
    def _batches(self) -> list[Int[np.ndarray, "cell_of_batch"]]:
        return [np.flatnonzero(self.batch == code) for code in range(len(self.batch_names))]

    @cached_property
    def _by_ilisi(self) -> Int[np.ndarray, "cell"]:
        return np.argsort(self.ilisi, kind="stable")

    @cached_property
    def _by_clisi(self) -> Int[np.ndarray, "labelled"]:
        return self.labelled[np.argsort(self.clisi[self.labelled], kind="stable")]


def _mean_of_means(values: np.ndarray, group: np.ndarray, weight: np.ndarray) -> float:
    """Mean within each group, then over the groups; NaN are left out."""
    use = np.isfinite(values)
    total = np.bincount(group[use], weights=weight[use])
    within = np.bincount(group[use], weights=(values * weight)[use])
    met = total > 0
    return float(np.mean(within[met] / total[met])) if met.any() else float("nan")


def _median(values: np.ndarray, order: np.ndarray, weight: np.ndarray) -> float:
    """Median of values that occur `weight` times; `order` sorts them. NaN where none occurs."""
    if not weight[order].any():
        return float("nan")
    upto = np.cumsum(weight[order])
    n = int(upto[-1])
    middle = np.searchsorted(upto, [(n - 1) // 2, n // 2], side="right")
    return float(values[order[middle]].mean())


def _explained(components: np.ndarray, batches: list[np.ndarray], weight: np.ndarray) -> float:
    """Share of the variance that lies between batches: what a regression of each component on the batch explains, by variance."""
    totals = np.array([weight[rows].sum() for rows in batches])
    sums = np.stack([weight[rows] @ components[rows] for rows in batches])
    squares = float(weight @ np.einsum("ij,ij->i", components, components))
    mean = sums.sum(axis=0) / totals.sum()
    met = totals > 0
    between = float((sums[met] ** 2 / totals[met, None]).sum() - totals.sum() * mean @ mean)
    return between / max(squares - float(totals.sum() * mean @ mean), 1e-12)
