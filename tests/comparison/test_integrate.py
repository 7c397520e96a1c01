from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from annformer.comparison import integrate
from annformer.comparison.cells import blind_cells, colours_of, drawn_cells, labels_of, not_coloured
from annformer.comparison.methods import Made, Method
from annformer.comparison.page import _how_judged
from annformer.comparison.verdicts import verdict_table
from annformer.data.anndata import AnnDataSource
from annformer.evaluate.verdict import draws
from annformer.report import scatter_figure
from annformer.scgpt import ScGPT
from annformer.tasks._integration_cells import FEWEST_CELLS
from annformer.tasks._integration_recipe import IntegrationRecipe
from annformer.vocab import GeneVocab
from comparison_cells import N_CELLS, quick, some_cells, table_of

OURS = [integrate.TUNED, integrate.SCRATCH, integrate.ZERO]
KEYS = {"batch_key": "batch", "label_key": "cell_type"}


def compared(adata, model, table, **options):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return integrate.compare_integration(adata, **KEYS, model=model, table=table, **({"seeds": (0, 1), "n_draws": 60} | options))


@pytest.fixture
def cells(tiny_adata):
    return some_cells(tiny_adata)


def best(found) -> dict[str, str]:
    rows = found.verdicts[found.verdicts["best_floor"]]
    return dict(zip(rows["score"], rows["verdict"], strict=True))


def test_a_planted_signal_beats_and_the_control_is_at_chance(cells, tiny_model):
    found = compared(cells, tiny_model, table_of(cells, 10.0, {"noise": 0.0, "faint": 1.0}))
    assert best(found)["overall"] == best(found)["avg_bio"] == "beats"
    assert found.verdicts.loc[found.verdicts["best_floor"] & (found.verdicts["score"] == "avg_bio"), "other"].item() == "faint"
    scores = found.means().set_index("method")
    assert scores.loc[integrate.TUNED, "avg_bio"] > 0.9
    assert abs(scores.loc["shuffled cells", "ari"]) < 0.05
    assert scores.loc["shuffled cells", "asw_label"] == pytest.approx(0.5, abs=0.03)
    assert scores.loc[integrate.TUNED, "seeds"] == 2
    against = found.verdicts.set_index(["score", "other"])["verdict"]
    assert against["avg_bio", "shuffled cells"] == "beats"
    assert "use annformer fine-tuned" in found.sentence


def test_a_floor_that_is_better_wins(cells, tiny_model):
    found = compared(cells, tiny_model, table_of(cells, 0.5, {"good": 10.0}))
    assert best(found)["overall"] == "loses"
    assert found.sentence.endswith("use good.")


def test_the_same_embedding_ties(cells, tiny_model):
    table = table_of(cells, 3.0, {})
    table["twin"] = Method("twin", "floor", table[integrate.TUNED].make)
    found = compared(cells, tiny_model, table)
    assert set(best(found).values()) == {"ties"}


def test_no_method_sees_a_label(cells, tiny_model):
    seen = []

    def spy(given, seed):
        seen.append(given)
        return Made(np.random.default_rng(seed).normal(size=(given.n_obs, 2)))

    compared(cells, tiny_model, {name: Method(name, kind, spy) for name, kind in (("a", "ours"), ("b", "floor"))})
    assert len(seen) == 4
    for given in seen:
        assert list(given.obs) == ["batch"]
        assert (list(given.obsm), list(given.uns), list(given.layers), given.raw) == ([], [], [], None)
        assert (csr_matrix(cells.X) != given.X).nnz == 0
        assert given.var_names.to_list() == cells.var_names.to_list()
        assert list(given.var) == []


def test_the_cells_are_not_changed(cells, tiny_model):
    before = cells.copy()
    compared(cells, tiny_model, table_of(cells, 1.0, {"floor": 1.0}), seeds=(0,))
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert (list(cells.obsm), list(cells.uns)) == ([], [])
    assert (cells.X != before.X).nnz == 0


def test_cells_that_a_method_cannot_represent_are_left_out_for_all(cells, tiny_model):
    table = table_of(cells, 5.0, {"floor": 5.0})

    def gaps(given, seed):
        embedding = table["floor"].make(given, seed).embedding.copy()
        embedding[[2, 5]] = np.nan
        return Made(embedding)

    found = compared(cells, tiny_model, table | {"floor": Method("floor", "floor", gaps)}, seeds=(0,))
    assert found.facts.cells["left out"].startswith("2 cells")
    assert {2, 5}.isdisjoint(found.maps.rows)
    assert len(found.maps.rows) == N_CELLS - 2
    assert np.isnan(found.embeddings["floor"][2]).all()
    assert found.embeddings["floor"].shape[0] == N_CELLS


def test_what_is_found_is_said(cells, tiny_model):
    found = compared(cells, tiny_model, table_of(cells, 2.0, {"floor": 2.0}), seeds=(0,), name="mine.h5ad", command="annformer compare")
    assert found.facts.cells["cells"] == "mine.h5ad"
    assert found.facts.cells["batches"] == "batch: 6"
    assert found.facts.cells["types"] == "cell_type: 3"
    assert found.facts.cells_by.loc["unknown"].sum() == 5
    assert "gene names" in found.facts.genes[0]
    assert found.unit == "whole batches (6 of them)"
    assert set(found.per_label["label"]) == {"B cell", "T cell", "monocyte"}
    assert (found.scores["seconds"] >= 0).all()


def idle() -> dict[str, Method]:
    """Methods that must not run; the first needs ten cells in every batch."""
    options = {"a": {"kind": "ours", "fewest_cells": 10}, "b": {"kind": "floor"}}
    return {name: Method(name, make=lambda *_: pytest.fail("a method ran"), **some) for name, some in options.items()}


@pytest.mark.parametrize("batch", ["type", "cell"])
def test_types_that_no_two_batches_share_are_refused_before_any_work(cells, tiny_model, batch):
    types = cells.obs["cell_type"].astype(str)
    cells.obs["batch"] = types if batch == "type" else types.where(types == "unknown", cells.obs_names)
    with pytest.raises(ValueError, match="no type of cell occurs in two batches"):
        compared(cells, tiny_model, idle(), seeds=(0,))


def test_small_batches_are_refused_before_any_work(cells, tiny_model):
    cells.obs["batch"] = np.where(np.arange(N_CELLS) < 9, "small", cells.obs["batch"].astype(str))
    with pytest.raises(ValueError, match=r"1 of 7 batches of .* very few cells: 'small' 9.*\n.*at least 10 cells.*\n.*leave a out of"):
        compared(cells, tiny_model, idle(), seeds=(0,))
    compared(cells, tiny_model, table_of(cells, 2.0, {"floor": 2.0}), seeds=(0,))  # methods that need no more


def test_types_in_two_of_six_batches_are_enough(cells, tiny_model):
    cells.obs.loc[~cells.obs["batch"].isin(["batch 0", "batch 1"]), "cell_type"] = "unknown"
    found = compared(cells, tiny_model, table_of(cells, 10.0, {"floor": 0.0}), seeds=(0,), n_draws=200)
    assert best(found)["overall"] == "beats"
    assert (found.n_units, found.n_left_out) == (None, 0)


def test_draws_without_a_type_are_counted(cells, tiny_model, caplog, monkeypatch):
    judged = []
    monkeypatch.setattr(integrate, "verdict_table", lambda *given: judged.append(given[3:]) or verdict_table(*given))
    cells.obs["batch"] = np.array([f"batch {n % 15}" for n in range(N_CELLS)])  # of 15 batches 5 with types: 0.2 % of draws have none
    cells.obs.loc[np.arange(N_CELLS) % 15 >= 5, "cell_type"] = "unknown"
    with caplog.at_level("INFO", logger="annformer"):
        found = compared(cells, tiny_model, table_of(cells, 10.0, {"floor": 0.0}), seeds=(0,), n_draws=2_000)
    assert (found.n_units, found.unit, judged) == (5, "whole batches (5 of 15 have types)", [(5,), (5, ("nmi", "ari", "asw_label"))])
    assert 0 < found.n_left_out < 40
    assert f"{found.n_left_out} of 2000 bootstrap draws have no cell" in caplog.text
    assert f"{found.n_left_out:,} draws without a cell" in _how_judged(found)
    assert "1.58 times as wide" in _how_judged(found)


def test_on_draws_only_the_scores_that_get_verdicts_are_computed(cells, tiny_model, monkeypatch):
    inside, calls = integrate.integration.IntegrationParts, []
    whole = inside.scores
    monkeypatch.setattr(inside, "scores", lambda self, rows=None: calls.append(rows) or whole(self, rows))
    monkeypatch.setattr(integrate, "draws", lambda *given: calls.append("drawn") or draws(*given))
    compared(cells, tiny_model, table_of(cells, 2.0, {"floor": 2.0}), seeds=(0,))
    assert calls == ["drawn", None, None, None]


def test_every_baseline_and_four_of_ours_are_in_the_table():
    from annformer.baselines.integration import INTEGRATION

    table = integrate.methods(batch_key="batch")
    assert {name for name, method in table.items() if method.kind == "floor"} == set(INTEGRATION)
    assert [name for name, method in table.items() if method.kind == "ours"] == [*OURS, integrate.ANCHORS]
    assert not table["PCA HVG"].random
    assert table["scVI HVG"].random
    assert [name for name, method in table.items() if method.slow] == ["scVI HVG"]
    assert {method.fewest_cells for method in table.values() if "fine-tuned" in method.name} == {FEWEST_CELLS}


def test_anchors_are_no_method_where_the_recipe_has_none():
    recipe = IntegrationRecipe.named("integrate").with_(anchor_weight=0.0)
    table = integrate.methods(batch_key="batch", recipe=recipe)
    assert [name for name, method in table.items() if method.kind == "ours"] == OURS


def test_anchors_alone_are_what_the_network_is_taught(cells, tiny_model, monkeypatch):
    from annformer.tasks import integration

    anchor = {"n_components": 12, "n_neighbours": 10}
    recipe = IntegrationRecipe.named("integrate").with_(n_genes=60, anchor=anchor)
    blind = blind_cells(AnnDataSource(cells), "batch")
    integrator = integration.BatchIntegrator(tiny_model, batch_key="batch", recipe=recipe, layer="X", seed=3)
    monkeypatch.setattr(integration, "trained", lambda *_, **__: pd.DataFrame())
    integrator.fit(blind.copy())
    taught = integrator.model_.objectives["anchor"].anchors.numpy()
    found = integrate.methods(tiny_model, batch_key="batch", recipe=recipe)[integrate.ANCHORS].make(blind, 3).embedding
    assert found.shape == (N_CELLS, 12)
    assert np.array_equal(found, taught)


def test_settings_and_genes_of_what_is_fine_tuned_are_said(cells, tiny_model, monkeypatch, tmp_path):
    unlearned = [name for name in cells.var_names if name in tiny_model.vocab.tokens][:1]
    model = ScGPT(tiny_model.config, GeneVocab(tiny_model.vocab.tokens, unlearned)).eval()
    recipe = IntegrationRecipe.named("integrate").with_(n_genes=60, anchor={"n_components": 12, "n_neighbours": 10})
    floor = "PCA all genes"
    taught = compared(cells, model, None, wanted=[integrate.ANCHORS, floor], recipe=recipe, seeds=(0,)).facts
    (tmp_path / "again.yaml").write_text(taught.recipe)
    assert IntegrationRecipe.named(str(tmp_path / "again.yaml")) == recipe
    assert "seed" not in taught.recipe, "the recipe's is not the one that was used"
    assert taught.genes[-1].endswith(f"has not learned 1 of the genes ({unlearned[0]}): it leaves them out until fine-tuning has taught it")
    alone = compared(cells, model, None, wanted=[integrate.ZERO, floor], recipe=recipe, seeds=(0,)).facts
    assert alone.recipe == ""
    assert any("1 column is a gene that the model has not learned" in line for line in alone.genes)


def test_the_sentence_hears_of_the_parts_of_avg_bio(cells, tiny_model, monkeypatch):
    heard = []
    monkeypatch.setattr(integrate, "sentence", lambda *_, parts: heard.append(parts) or "said")
    found = compared(cells, tiny_model, table_of(cells, 6.0, {"floor": 1.0}), seeds=(0,))
    parts = heard[0].query("other == 'floor'").set_index("score")
    means = found.means().set_index("method")
    assert list(parts.index) == ["nmi", "ari", "asw_label"]
    for name, row in parts.iterrows():
        assert row["difference"] == pytest.approx(means.loc[integrate.TUNED, name] - means.loc["floor", name])
        assert row["low"] <= row["difference"] <= row["high"] and row["verdict"] == "beats"


def test_what_fine_tuning_adds_to_its_anchors_is_said(cells, tiny_model):
    table = table_of(cells, 10.0, {"floor": 0.0})
    table[integrate.ANCHORS] = Method(integrate.ANCHORS, "ours", table[integrate.TUNED].make)
    found = compared(cells, tiny_model, table, seeds=(0,))
    assert any("than annformer anchors alone, the places that the network is taught, without the network (" in note for note in found.notes)


def test_zero_shot_gets_device_and_threads(cells, tiny_model, monkeypatch):
    seen = {}

    def embed(adata, model, *, device, **_):
        seen.update(device=device, threads=torch.get_num_threads())
        adata.obsm["X_annformer"] = np.zeros((adata.n_obs, 2))

    before = torch.get_num_threads()
    monkeypatch.setattr("annformer.tasks.embedding.embed", embed)
    integrate.methods(tiny_model, batch_key="batch", device="cuda:1", threads=before + 1)[integrate.ZERO].make(cells.copy(), 0)
    assert seen == {"device": "cuda:1", "threads": before + 1}
    assert torch.get_num_threads() == before


def test_zero_shot_and_pca_run_on_blind_cells(cells, tiny_model):
    table = integrate.methods(tiny_model, batch_key="batch")
    blind = blind_cells(AnnDataSource(cells), "batch")
    for name in (integrate.ZERO, "PCA all genes"):
        embedding = table[name].make(blind.copy(), 0).embedding
        assert embedding.shape[0] == N_CELLS
        assert np.isfinite(embedding).all()


def test_missing_types_are_no_type(cells):
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[1, cells.obs.columns.get_loc("cell_type")] = None
    assert labels_of(AnnDataSource(cells), "cell_type")[:2].tolist() == ["unknown", "unlabelled"]


def test_rare_types_are_drawn_too():
    labels = np.array(["common"] * 5_000 + ["rare"] * 7)
    rows = drawn_cells(labels, np.arange(len(labels)) != 5_000, seed=0, most=100)
    assert len(rows) == 100
    assert (labels[rows] == "rare").sum() == 6
    assert (np.diff(rows) > 0).all()


def test_of_very_many_cells_some_of_every_type_and_batch_are_scored(cells, tiny_model, monkeypatch):
    monkeypatch.setattr("annformer.comparison.cells.MOST_SCORED", 120)
    monkeypatch.setattr("annformer.comparison.cells.FEWEST_DRAWN", 3)
    seen = []
    whole = integrate.integration.integration_parts
    monkeypatch.setattr(
        integrate.integration,
        "integration_parts",
        lambda values, labels, batches, **options: seen.append((labels, batches)) or whole(values, labels, batches, **options),
    )
    found = compared(cells, tiny_model, table_of(cells, 6.0, {"PCA HVG": 1.0}))
    assert found.facts.cells["scored"] == "120 cells, drawn at random"
    counted = pd.crosstab(*seen[0])
    assert counted.to_numpy().sum() == 120
    there = pd.crosstab(cells.obs["cell_type"].astype(str), cells.obs["batch"].astype(str))
    assert (counted >= np.minimum(there, 3)).all(axis=None)
    assert all((labels == seen[0][0]).all() for labels, _ in seen)


def test_columns_that_can_colour_a_map(cells):
    cells.obs["one"], cells.obs["name"], cells.obs["flag"] = "same", [f"c{n}" for n in range(N_CELLS)], np.arange(N_CELLS) % 2 == 0
    assert list(colours_of(cells.obs, "cell_type", "batch")) == ["batch", "cell_type", "depth", "flag"]
    cells.obs["same"], cells.obs["empty"] = 7, None
    said = not_coloured(cells.obs, "cell_type", "batch")["not among the colours"]
    assert said == "one, same (one value); name (more than 56 values); empty (no value)"
    many = cells.obs.drop(columns=["one", "same", "empty", "name"]).assign(**{f"n{i}": np.arange(N_CELLS) for i in range(40)})
    assert not_coloured(many, "cell_type", "batch")["not among the colours"] == "n36, n37, n38, n39 (more than 40 columns)"
    assert not_coloured(cells.obs.drop(columns=["one", "same", "empty", "name"]), "cell_type", "batch") == {}


def test_numbered_batches_and_types_are_names(cells):
    cells.obs["batch"], cells.obs["leiden"] = np.arange(N_CELLS) % 3, pd.Categorical(np.arange(N_CELLS) % 4)
    cells.obs.iloc[1, cells.obs.columns.get_loc("leiden")] = None
    columns = colours_of(cells.obs, "leiden", "batch")
    assert columns["batch"].to_list()[:4] == ["0", "1", "2", "0"]
    assert columns["leiden"].to_list()[:4] == ["0", "unlabelled", "2", "3"]
    payload = scatter_figure({"map": np.zeros((N_CELLS, 2))}, columns, colour_by=["batch", "leiden"], caption="").payload
    assert ["levels" in column for column in payload["columns"][:2]] == [True, True]
