from __future__ import annotations

import numpy as np
import pytest

from annformer.evaluate import clustering, clustering_scores

LABELS = np.repeat(["B", "NK", "T"], 40)


def planted() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.repeat(np.eye(3) * 5, 40, axis=0) + 0.3 * rng.normal(size=(120, 3))


@pytest.mark.parametrize("graph", [True, False])
def test_planted_clusters_are_found_by_leiden_and_by_k_means(monkeypatch, graph):
    if graph:
        pytest.importorskip("igraph")
    else:
        monkeypatch.setattr(clustering, "find_spec", lambda _: None)
    row = clustering_scores(planted(), LABELS, resolution=0.2).iloc[0]
    assert row.method.startswith("Leiden" if graph else "k-means")
    assert row.n_clusters == 3
    assert row.ari == pytest.approx(1)
    assert row.nmi == pytest.approx(1)
    assert row.silhouette > 0.9
    assert row.avg_bio == pytest.approx((1 + 1 + (row.silhouette + 1) / 2) / 3)


def test_shuffled_labels_score_nothing():
    shuffled = np.random.default_rng(0).permutation(LABELS)
    row = clustering_scores(planted(), shuffled, resolution=0.2).iloc[0]
    assert abs(row.ari) < 0.05
    assert row.silhouette < 0.05
