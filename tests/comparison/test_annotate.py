from __future__ import annotations

import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from annformer.comparison import annotate, annotation_cells
from annformer.comparison.annotation_cells import BY_BATCH, RANDOM
from annformer.comparison.annotation_methods import EXPRESSION, MAPPING, NETWORK, OURS, SCRATCH, methods
from annformer.comparison.calls import CONTROL, TYPE, Called, Caller
from annformer.data.anndata import AnnDataSource
from annformer.errors import AnnformerWarning
from annotation_callers import quick, table_of
from comparison_cells import N_CELLS, some_cells

N_TYPED = N_CELLS - 5


def compared(adata, model, table, *, embed=False, **options):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, embed=embed)
        given = {"seeds": (0, 1), "n_draws": 80, "novelty": False} | options
        return annotate.compare_annotation(adata, label_key="cell_type", model=model, table=table, **given)


def best(found) -> dict[str, tuple[str, str]]:
    rows = found.verdicts[found.verdicts["best_floor"]]
    return {row["score"]: (row["other"], row["verdict"]) for _, row in rows.iterrows()}


@pytest.fixture
def cells(tiny_adata) -> ad.AnnData:
    return some_cells(tiny_adata)


@pytest.mark.parametrize("logarithm", [np.log1p, lambda x: np.log2(1 + x)])
def test_logarithms_are_undone_for_all_methods_alike(cells, logarithm):
    counts = cells.X.toarray()
    shares = 1e4 * counts / counts.sum(axis=1, keepdims=True)
    logs = ad.AnnData(np.asarray(logarithm(shares), np.float32), obs=cells.obs, var=cells.var)
    with pytest.warns(AnnformerWarning, match="logarithms"):
        undone = annotation_cells.typed_cells(AnnDataSource(logs), "cell_type", None)
    kept = undone.kept
    assert np.allclose(
        undone.cells.X.toarray(), shares[kept][:, [cells.var_names.get_loc(name) for name in undone.cells.var_names]], rtol=1e-3
    )


@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_a_planted_signal_beats_and_the_control_is_at_chance(cells, tiny_model, batch_key):
    found = compared(cells, tiny_model, table_of(cells, 0.95, {"poor": 0.5, "fair": 0.7}), batch_key=batch_key)
    assert best(found) == {"macro_f1": ("fair", "beats"), "accuracy": ("fair", "beats")}
    scores = found.means().set_index("method")
    assert scores.loc[OURS, "macro_f1"] == pytest.approx(0.95, abs=0.05)
    assert scores.loc[CONTROL, "accuracy"] == pytest.approx(1 / 3, abs=0.12)
    assert scores.loc[EXPRESSION, "accuracy"] == 1
    assert found.verdicts.set_index(["score", "other"])["verdict"]["macro_f1", CONTROL] == "beats"
    assert "annformer beats the best baseline, fair, in macro-F1 (" in found.sentence
    assert found.sentence.endswith("; ahead of fair in accuracy, the best in that): use annformer.")
    assert f"worse than {EXPRESSION}, the same without the network, which is to be preferred here" in found.notes[0]


def test_a_floor_that_is_better_wins(cells, tiny_model):
    found = compared(cells, tiny_model, table_of(cells, 0.5, {"good": 0.95}))
    assert best(found)["macro_f1"] == ("good", "loses")
    assert found.sentence.endswith("use good.")


def test_the_same_calls_tie(cells, tiny_model):
    table = table_of(cells, 0.8, {})
    ours = table[OURS].call
    table["twin"] = Caller("twin", "floor", lambda *given: dataclasses.replace(ours(*given), parts={}), random=True)
    assert best(compared(cells, tiny_model, table)) == {"macro_f1": ("twin", "ties"), "accuracy": ("twin", "ties")}


def test_batches_are_held_out_and_beside_them_cells_at_random(cells, tiny_model):
    found = compared(cells, tiny_model, table_of(cells, 0.9, {"floor": 0.6}), batch_key="batch")
    assert (found.split, found.n_units, found.unit) == (BY_BATCH, 6, "whole batches (6 of them)")
    assert len(found.folds) == 5
    assert found.folds["cells"].sum() == N_TYPED
    assert sum(name.count("batch") for name in found.folds["held out"]) == 6
    scores = found.more_tables["scores.csv"]
    counted = scores.groupby(["method", "split"]).size().to_dict()
    assert counted[OURS, BY_BATCH] == 2
    assert counted[OURS, RANDOM] == counted["floor", BY_BATCH] == counted["floor", RANDOM] == 1
    assert set(found.scores["split"]) == {BY_BATCH}
    assert set(found.beside["split"]) == {BY_BATCH, RANDOM}
    assert found.coverage["split"].to_list() == [BY_BATCH, RANDOM]
    predicted = found.more_tables["predictions.csv"].set_index("cell")
    assert (cells.obs["batch"].astype(str).loc[predicted.index].to_numpy() != predicted["held out with"]).any()
    assert all(
        batch in name for batch, name in zip(cells.obs["batch"].loc[predicted.index].astype(str), predicted["held out with"], strict=True)
    )


def test_few_batches_are_held_out_but_cells_are_drawn(cells, tiny_model):
    cells.obs["batch"] = cells.obs["batch"].astype(str).replace({"batch 4": "batch 0", "batch 5": "batch 1"})
    found = compared(cells, tiny_model, table_of(cells, 0.9, {"floor": 0.6}), batch_key="batch")
    assert (found.n_units, found.unit) == (None, "cells within their type (with 4 batches, too few to draw batches)")
    assert found.folds["held out"].to_list() == [f"batch {n}" for n in range(4)]


@pytest.mark.parametrize(("n_batches", "units"), [(6, 6), (4, None)])
def test_what_is_drawn_is_what_is_said(cells, tiny_model, monkeypatch, n_batches, units):
    drawn, judged = [], []
    whole = annotate.draws, annotate.verdict_table
    monkeypatch.setattr(annotate, "draws", lambda *given: drawn.append(given[0]) or whole[0](*given))
    monkeypatch.setattr(annotate, "verdict_table", lambda *given: judged.append(given[3]) or whole[1](*given))
    cells.obs["batch"] = [f"batch {n % n_batches}" for n in range(N_CELLS)]
    found = compared(cells, tiny_model, table_of(cells, 0.9, {"floor": 0.6}), batch_key="batch", seeds=(0,))
    assert [None if given is None else len(set(given)) for given in drawn] == judged == [units] == [found.n_units]


def test_cells_without_a_type_take_no_part(cells, tiny_model):
    asked = []

    def spy(reference, query, seed):
        asked.extend(query.obs_names)
        return Called(np.full(query.n_obs, "B cell", object))

    before = cells.copy()
    found = compared(cells, tiny_model, {"a": Caller("a", "ours", spy), "b": Caller("b", "floor", spy)}, seeds=(0,))
    untyped = set(cells.obs_names[cells.obs["cell_type"] == "unknown"])
    assert set(asked) == set(cells.obs_names) - untyped
    assert found.facts.cells["left out"] == "5 cells without a type"
    assert len(found.more_tables["predictions.csv"]) == N_TYPED
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert (list(cells.obsm), list(cells.uns)) == ([], [])


def test_a_type_that_one_batch_has_alone_is_called_wrongly_by_all(cells, tiny_model):
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.add_categories("rare")
    cells.obs.iloc[[6, 12], cells.obs.columns.get_loc("cell_type")] = "rare"  # both in batch 0
    found = compared(cells, tiny_model, table_of(cells, 1.0, {"floor": 1.0}), batch_key="batch", seeds=(0,))
    assert found.n_unseen == found.folds["of types nobody could learn"].sum() == 2
    recall = found.per_label.set_index(["method", "label"])["recall"]
    assert recall[OURS, "rare"] == 0
    assert recall[OURS, "B cell"] == 1


def test_a_type_of_one_cell_is_no_reason_to_stop(cells, tiny_model, monkeypatch):
    monkeypatch.setattr(annotation_cells, "MOST_FOLDS", 2)
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.add_categories("single")
    cells.obs.iloc[1, cells.obs.columns.get_loc("cell_type")] = "single"
    table = methods(tiny_model)
    found = compared(cells, tiny_model, {name: table[name] for name in (OURS, "majority class")}, embed=True, seeds=(0,))
    assert found.per_label.set_index(["method", "label"])["f1"][OURS, "single"] == 0
    assert found.n_unseen == 1


def test_coverage_counts_held_sets_and_empty_ones(cells, tiny_model):
    found = compared(cells, tiny_model, table_of(cells, 1.0, {"floor": 0.5}), seeds=(0,))
    row = found.coverage.iloc[0]
    assert row["coverage"] == pytest.approx(1 - 5 / N_TYPED)
    assert row["empty"] == pytest.approx(5 / N_TYPED)
    assert row["low"] < 0.9 < row["high"]
    assert found.more_tables["predictions.csv"]["annformer: set"].eq("").sum() == 5


def test_novelty_is_of_types_that_were_not_learned(cells, tiny_model):
    table = table_of(cells, 0.9, {"logistic regression all genes": 0.9})
    whole = compared(cells, tiny_model, table, seeds=(0,), novelty=True)
    found, mean = whole.novelty, whole.novelty_mean.set_index("method")
    assert (found[["low", "high"]].to_numpy() == found[["auroc", "auroc"]].to_numpy()).all()  # all cells of a method say the same
    assert mean.loc[OURS].tolist() == [3, 1, 1, 1] and mean.loc["logistic regression all genes", "auroc"] == 0.5
    assert list(whole.more_tables["novelty_mean.csv"]["method"]) == [OURS, "logistic regression all genes"]
    ours, floor = (found[found["method"] == name] for name in (OURS, "logistic regression all genes"))
    assert sorted(ours["label"]) == ["B cell", "T cell", "monocyte"]
    assert ours["n"].sum() == N_TYPED
    assert (ours["auroc"] == 1).all()
    assert (floor["auroc"] == 0.5).all()


@pytest.mark.parametrize(("n_types", "asked", "done"), [(3, None, True), (3, False, False), (2, None, False), (2, True, False)])
def test_novelty_is_looked_at_where_it_is_quick_or_asked_for(cells, tiny_model, n_types, asked, done):
    if n_types == 2:
        cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace("monocyte", "T cell")
    found = compared(cells, tiny_model, table_of(cells, 0.9, {"floor": 0.9}), seeds=(0,), novelty=asked)
    assert (len(found.novelty) > 0) == done


def test_every_baseline_and_ours_are_in_the_table():
    from annformer.baselines import ANNOTATION

    table = methods()
    assert {name for name, caller in table.items() if caller.kind == "floor"} == set(ANNOTATION)
    assert [name for name, caller in table.items() if caller.kind == "ours"] == [OURS, SCRATCH, MAPPING]
    assert [name for name, caller in table.items() if caller.only_by_name] == [SCRATCH]


def test_from_scratch_runs_only_when_it_is_named(cells, tiny_model):
    table = table_of(cells, 0.9, {"floor": 0.5})
    table[SCRATCH] = dataclasses.replace(table[OURS], name=SCRATCH, only_by_name="slow")
    found = compared(cells, tiny_model, table, seeds=(0,))
    assert SCRATCH not in set(found.scores["method"])
    assert found.facts.skipped == {SCRATCH: "slow"}
    found = compared(cells, tiny_model, table, seeds=(0,), wanted=["floor", "from-scratch", "annformer"])
    assert SCRATCH in set(found.scores["method"])
    assert found.ours == OURS


def test_real_methods_learn_from_one_embedding(cells, tiny_model, monkeypatch):
    from annformer.tasks import _encoding

    monkeypatch.setattr(annotation_cells, "MOST_FOLDS", 2)

    cells_read = []
    whole = _encoding.encode_cells

    def counted(model, source, *given, **more):
        for rows, states in whole(model, source, *given, **more):
            cells_read.append(len(states))
            yield rows, states

    monkeypatch.setattr(_encoding, "encode_cells", counted)
    table = methods(tiny_model)
    names = (OURS, MAPPING, "logistic regression all genes", "majority class")
    found = compared(cells, tiny_model, {name: table[name] for name in names}, embed=True, seeds=(0,))
    assert sum(cells_read) == N_TYPED
    scores = found.means().set_index("method")
    assert {OURS, EXPRESSION, NETWORK, MAPPING} <= set(scores.index)
    assert scores.loc[OURS, "accuracy"] > 0.9
    assert scores.loc[MAPPING, "accuracy"] > scores.loc["majority class", "accuracy"]
    assert np.isfinite(scores.loc[[OURS, MAPPING, "logistic regression all genes"], "ece"]).all()
    assert 0 <= found.error.low <= found.error.median <= found.error.high
    assert 0 <= found.calibrated.low <= found.calibrated.high < 0.1
    assert found.coverage.loc[0, "coverage"] > 0.7


def test_from_scratch_makes_its_own_embedding(tiny_adata, tiny_model):
    reference, query = tiny_adata(60, seed=1), tiny_adata(9, seed=2)
    del reference.obs["batch"], query.obs["batch"], query.obs["cell_type"]
    said = methods(tiny_model)[SCRATCH].call(reference, query, 0)
    assert set(said.types) <= set(reference.obs["cell_type"])
    assert said.sets.shape == (9, 3)
    assert said.parts == {}, "its parts would bear the names of those of the pretrained network"


def idle() -> dict[str, Caller]:
    return {name: Caller(name, kind, lambda *_: pytest.fail("a method ran")) for name, kind in (("a", "ours"), ("b", "floor"))}


def test_types_that_stand_for_batches_are_refused_before_any_work(cells, tiny_model):
    cells.obs["batch"] = np.where(cells.obs["cell_type"] == "B cell", "one", "two")
    cells = cells[cells.obs["cell_type"] != "monocyte"].copy()
    with pytest.raises(ValueError, match=r"with one held out there is one type, 'T cell', to learn from.*\n.*\n.*leave it out"):
        compared(cells, tiny_model, idle(), batch_key="batch")


def test_names_of_cells_are_no_types(cells, tiny_model):
    cells.obs["cell_type"] = cells.obs_names
    with pytest.raises(ValueError, match="180 values for 180 cells"):
        compared(cells, tiny_model, idle())


def test_the_type_is_told_under_one_name_whatever_the_column_is_called(cells, tiny_model):
    seen = []

    def spy(reference, query, seed):
        seen.append(list(reference.obs))
        return Called(np.full(query.n_obs, "B cell", object))

    cells.obs["kind"] = cells.obs["cell_type"]
    table = {"a": Caller("a", "ours", spy), "b": Caller("b", "floor", spy)}
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        annotate.compare_annotation(cells, label_key="kind", model=tiny_model, table=table, seeds=(0,), n_draws=10)
    assert set(map(tuple, seen)) == {(TYPE,)}


def test_settings_of_ours_are_said_where_it_learned_by_them(cells, tiny_model, monkeypatch):
    table = table_of(cells, 0.9, {"floor": 0.5})
    table[MAPPING] = dataclasses.replace(table[OURS], name=MAPPING)
    monkeypatch.setattr(annotate, "methods", lambda *_, **__: table)
    recipes = [compared(cells, tiny_model, None, seeds=(0,), wanted=[ours, "floor"]).facts.recipe for ours in (OURS, MAPPING)]
    assert "tuning: frozen" in recipes[0]
    assert recipes[1] == ""
