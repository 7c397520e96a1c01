from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from annformer.errors import InputError
from annformer.evaluate import DEFINITIONS, _integration_cells, draws, integration_parts, integration_scores, per_label_scores
from annformer.evaluate._integration_parts import LABEL_SCORES

scib = pytest.importorskip("scib_metrics")

N = 360
TYPES = np.repeat(["B", "NK", "T"], 120)
BATCHES = np.tile(["x", "y", "z"], 120)
UNEQUAL = np.random.default_rng(9).choice(["x", "y", "z"], N, p=[0.6, 0.3, 0.1])
NEED_NO_LABELS = {"pcr", "kbet", "ilisi"}


def planted(case: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    by_type, by_batch = np.zeros((N, 8)), np.zeros((N, 8))
    by_type[np.arange(N), np.unique(TYPES, return_inverse=True)[1]] = 8
    by_batch[np.arange(N), 3 + np.unique(BATCHES, return_inverse=True)[1]] = 8
    signal = {"perfect": by_type, "random": 0, "types mixed": by_batch, "batches apart": by_type + 1.5 * by_batch}[case]
    return (signal + rng.normal(size=(N, 8))).astype(np.float32)


CASES = ("perfect", "random", "types mixed", "batches apart")


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return pd.concat([integration_scores(planted(case), TYPES, BATCHES).assign(case=case) for case in CASES]).set_index("case")


def test_every_score_is_defined_and_in_its_place(scores):
    assert list(scores.columns) == list(DEFINITIONS)
    bio, mixing = scores[["nmi", "ari", "asw_label"]].mean(axis=1), scores[["graph_connectivity", "asw_batch"]].mean(axis=1)
    assert np.allclose(scores.avg_bio, bio)
    assert np.allclose(scores.avg_batch, mixing)
    assert np.allclose(scores.overall, 0.6 * bio + 0.4 * mixing)


def test_perfect_integration(scores):
    found = scores.loc["perfect"]
    assert found[["nmi", "ari", "graph_connectivity", "clisi"]].min() > 0.98
    assert found[["asw_batch", "pcr", "kbet"]].min() > 0.9
    assert found[["asw_label", "ilisi"]].min() > 0.8
    assert found.overall == scores.overall.max()


def test_a_random_embedding_mixes_batches_and_knows_no_type(scores):
    found = scores.loc["random"]
    assert found.nmi < 0.1
    assert abs(found.ari) < 0.05
    assert found.clisi < 0.2
    assert found[["kbet", "ilisi", "pcr", "asw_batch"]].min() > 0.8


def test_types_mixed_and_batches_separated_is_the_worst(scores):
    found = scores.loc["types mixed"]
    assert found.nmi < 0.1
    assert found.kbet == 0
    assert found.ilisi < 0.01
    assert found.pcr < 0.3
    assert found.asw_batch < 0.4
    assert found.overall == scores.overall.min()


def test_batches_apart_within_types_costs_what_counts_batches_only(scores):
    found = scores.loc["batches apart"]
    assert found.clisi > 0.98
    assert found.asw_label > 0.5
    assert found.kbet == 0
    assert found.ilisi < 0.01
    assert found.graph_connectivity < 0.5
    assert found.asw_batch < 0.4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batches", [BATCHES, UNEQUAL], ids=["equal", "unequal"])
def test_on_all_cells_the_scores_are_those_of_scib_metrics(case, batches):
    pytest.importorskip("igraph")
    x = planted(case)
    ours = integration_scores(x, TYPES, batches, seed=7).iloc[0]
    exact = _integration_cells.nearest(x, 90)
    theirs = scib.nmi_ari_cluster_labels_leiden(exact.first(15), TYPES, seed=7)
    theirs["asw_label"] = scib.silhouette_label(x, TYPES)
    theirs["asw_batch"] = scib.silhouette_batch(x, TYPES, batches)
    theirs["graph_connectivity"] = scib.graph_connectivity(exact.first(15), TYPES)
    theirs["kbet"] = scib.kbet(exact.first(50), batches)[0]
    theirs["ilisi"] = scib.ilisi_knn(exact.first(90), batches)
    theirs["clisi"] = scib.clisi_knn(exact.first(90), TYPES)
    theirs["pcr"] = 1 - scib.utils.principal_component_regression(x, batches, categorical=True)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=2e-5)


def test_pcr_of_a_wide_representation_takes_fifty_components():
    wide = planted("batches apart") @ np.random.default_rng(1).normal(size=(8, 80)) + np.random.default_rng(2).normal(size=(N, 80))
    theirs = scib.utils.principal_component_regression(wide, BATCHES, categorical=True, n_components=50)
    assert integration_scores(wide, None, BATCHES).pcr[0] == pytest.approx(1 - theirs, abs=1e-4)


def test_neighbours_are_exact_and_begin_with_the_cell():
    x = planted("random")
    x[5] = x[6]
    near = _integration_cells.nearest(x, 15)
    apart = np.linalg.norm(x[:, None] - x, axis=2)
    assert np.array_equal(near.indices[:, 0], np.arange(N))
    assert np.allclose(near.distances, np.sort(apart, axis=1)[:, :15], atol=1e-4)
    assert np.allclose(np.take_along_axis(apart, near.indices, axis=1), near.distances, atol=1e-4)


def test_a_draw_counts_cells_as_often_as_it_names_them():
    parts = integration_parts(planted("batches apart") * [1, 0.3, 1, 1, 1, 1, 1, 1], TYPES, UNEQUAL)
    rows = np.random.default_rng(3).integers(N, size=251)
    found = parts.scores(rows)
    label, batch = parts.label[rows], parts.batch[rows]
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(label, parts.cluster[rows]))
    assert found["ari"] == pytest.approx(adjusted_rand_score(label, parts.cluster[rows]))
    assert found["asw_label"] == pytest.approx((parts.silhouette_label[rows].mean() + 1) / 2)
    assert found["graph_connectivity"] == pytest.approx(np.mean([parts.connected[rows][label == i].mean() for i in range(3)]))
    assert found["asw_batch"] == pytest.approx(np.mean([parts.silhouette_batch[rows][label == i].mean() for i in range(3)]))
    assert found["kbet"] == pytest.approx(parts.kbet[rows].mean())
    assert found["ilisi"] == pytest.approx(np.median(parts.ilisi[rows]))
    assert found["clisi"] == pytest.approx(np.median(parts.clisi[rows]))
    centred = parts.components[rows] - parts.components[rows].mean(axis=0)
    between = sum((batch == i).sum() * (centred[batch == i].mean(axis=0) ** 2).sum() for i in range(3))
    assert found["pcr"] == pytest.approx(1 - between / (centred**2).sum())


def test_a_draw_without_a_type_or_a_batch_is_scored_on_the_others():
    parts = integration_parts(planted("perfect"), TYPES, BATCHES)
    found = parts.scores(np.flatnonzero((TYPES != "NK") & (BATCHES != "y")))
    assert all(np.isfinite(value) for value in found.values())
    assert found["ari"] == pytest.approx(1)


def test_a_draw_without_a_labelled_cell_has_no_score_of_labels():
    batches = np.tile([f"batch {n}" for n in range(6)], N // 6)
    labels = np.where(np.isin(batches, ["batch 0", "batch 1"]), TYPES, "unknown")
    parts = integration_parts(planted("perfect"), labels, batches)
    found = parts.scores(np.flatnonzero(labels == "unknown"))
    assert list(found) == list(DEFINITIONS)
    assert {name for name, value in found.items() if np.isfinite(value)} == NEED_NO_LABELS


def test_scores_of_weights_are_those_of_rows():
    parts, rows = integration_parts(planted("batches apart"), TYPES, BATCHES), np.random.default_rng(1).integers(N, size=N)
    by_weight = parts.label_scores(np.bincount(rows, minlength=N).astype(float))
    assert list(by_weight) == list(LABEL_SCORES)
    assert parts.scores(rows) | by_weight == parts.scores(rows)


def test_all_rows_once_are_the_scores_of_all_cells():
    parts = integration_parts(planted("batches apart"), TYPES, BATCHES)
    assert parts.scores(np.random.default_rng(0).permutation(N)) == pytest.approx(parts.scores())


def test_unlabelled_cells_do_not_touch_what_needs_labels():
    x, rng = planted("batches apart"), np.random.default_rng(4)
    more = np.vstack([x, 4 + rng.normal(size=(90, 8))])
    labels = np.array([*TYPES, *["unlabelled"] * 30, *["unknown"] * 30, *[None] * 30], dtype=object)
    batches = np.concatenate([BATCHES, np.tile(["x", "y", "z"], 30)])
    whole, parts = integration_parts(x, TYPES, BATCHES), integration_parts(more, labels, batches)
    needing = set(DEFINITIONS) - NEED_NO_LABELS
    assert {k: v for k, v in parts.scores().items() if k in needing} == {k: v for k, v in whole.scores().items() if k in needing}
    assert parts.scores()["pcr"] != whole.scores()["pcr"]
    assert (parts.label[N:] == -1).all()
    assert per_label_scores(parts).equals(per_label_scores(whole))


def test_without_labels_there_is_what_needs_none():
    with_labels, without = integration_scores(planted("random"), TYPES, BATCHES), integration_scores(planted("random"), None, BATCHES)
    assert set(without.columns) == NEED_NO_LABELS
    assert with_labels[list(without.columns)].equals(without)


def test_k_means_where_there_is_no_igraph(monkeypatch):
    monkeypatch.setattr(_integration_cells, "find_spec", lambda _: None)
    parts = integration_parts(planted("perfect"), TYPES, BATCHES)
    assert parts.clustering == "k-means, k = 3"
    assert parts.scores()["ari"] == pytest.approx(1)


def test_scores_of_each_label():
    x = planted("perfect")
    x[TYPES == "T"] += 12 * np.eye(8)[7] * (BATCHES[TYPES == "T"] == "x")[:, None]  # batch x lies apart, among T cells only
    table = per_label_scores(integration_parts(x, TYPES, np.where(TYPES == "NK", "y", BATCHES))).set_index("label")
    assert table.n.to_dict() == {"B": 120, "NK": 120, "T": 120}
    assert table.n_batches.to_dict() == {"B": 3, "NK": 1, "T": 3}
    assert np.isnan(table.asw_batch["NK"])
    assert table.asw_batch["T"] < 0.8 < 0.9 < table.asw_batch["B"]
    assert table.connected["T"] == pytest.approx(2 / 3, abs=0.02)
    assert table.cluster_f1["B"] == pytest.approx(1)
    assert table.silhouette.between(-1, 1).all()


def test_same_seed_same_scores():
    x = planted("random")
    assert integration_scores(x, TYPES, BATCHES, seed=3).equals(integration_scores(x, TYPES, BATCHES, seed=3))


def test_bootstrap_of_shuffled_labels_is_at_chance():
    shuffled = np.random.default_rng(5).permutation(TYPES)
    parts = integration_parts(planted("perfect"), shuffled, BATCHES)
    ari = [parts.scores(rows)["ari"] for rows in draws(None, shuffled, 50)]
    assert np.abs(ari).max() < 0.05


@pytest.mark.parametrize(
    ("representation", "labels", "batches", "message"),
    [
        (planted("random"), TYPES, np.full(N, "x"), "one batch"),
        (planted("random"), np.full(N, "T"), BATCHES, "1 cell type"),
        (planted("random"), np.full(N, "unknown"), BATCHES, "0 cell type"),
        (np.where(np.arange(N)[:, None] == 3, np.nan, planted("random")), TYPES, BATCHES, "1 of 360 cells"),
        (planted("random"), TYPES, np.where(np.arange(N) < 5, None, BATCHES.astype(object)), "5 of 360 cells have no batch"),
    ],
)
def test_what_cannot_be_scored_is_named(representation, labels, batches, message):
    with pytest.raises(InputError, match=message):
        integration_scores(representation, labels, batches)
