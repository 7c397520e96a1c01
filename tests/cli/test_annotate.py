"""`annformer annotate`: files, options, stopped runs."""

from __future__ import annotations

import shlex

import anndata
import pandas as pd
import pytest

from annformer.cli import main
from annformer.tasks.annotation import CellTypeClassifier

FIT = "annotate fit ref.h5ad --label_key cell_type --model model --out classifier --threads 1"
PREDICT = "annotate predict query.h5ad --model classifier --out out.h5ad --threads 1"
TUNED = "--recipe recipe.yaml"
RECIPE = """\
tuning: low-rank
n_genes: 80
max_length: 30
train: {epochs: 2, tokens_per_step: 2000, tokens_per_forward: 4000, max_length: 30, validations: 2}
"""
ENDS = ("", "_confidence", "_novelty", "_set", "_by_expression", "_by_network")


@pytest.fixture
def cells(tiny_adata, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_adata(90, seed=1).write_h5ad("ref.h5ad")
    query = tiny_adata(30, seed=2)
    query.obs["leiden"] = query.obs["cell_type"].astype(str)
    query.write_h5ad("query.h5ad")
    tiny_model.save_pretrained("model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)


def run(line: str) -> int:
    return main(shlex.split(line))


@pytest.fixture
def stopped(monkeypatch):
    """Run a line that Ctrl-C ends when the classifier is learned, and not yet saved."""

    def to_the_end(line: str) -> None:
        def ctrl_c(*_args, **_options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(CellTypeClassifier, "save", ctrl_c)
            assert run(line) == 2

    return to_the_end


def test_from_reference_to_types(cells, tmp_path, capsys):
    assert run(FIT) == 0
    said = capsys.readouterr().out
    assert "classifier: 90 cells of 3 types (B cell, T cell, monocyte)" in said
    assert "on cells held back: accuracy" in said and "always the most frequent type" in said
    held_back = CellTypeClassifier.load("classifier").held_back_
    for part in ("expression", "network"):
        assert f"{part} accuracy {held_back[f'{part}_accuracy']:.3f}, macro-F1 {held_back[f'{part}_macro_f1']:.3f}" in said
    assert run(PREDICT) == 0
    assert "out.h5ad: obs['predicted_cell_type'] of 30 cells: " in capsys.readouterr().out
    written, table = anndata.read_h5ad("out.h5ad").obs, pd.read_csv("out.csv", index_col="cell")
    assert list(table.columns) == [f"predicted_cell_type{end}" for end in ENDS]
    assert list(table["predicted_cell_type"]) == list(written["predicted_cell_type"].astype(str))
    expected = CellTypeClassifier.load("classifier").predict(anndata.read_h5ad("query.h5ad"), copy=True).obs
    assert list(expected["predicted_cell_type_set"]) == list(table["predicted_cell_type_set"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ref.h5ad", "query.h5ad", "model", "recipe.yaml", "classifier", "out.h5ad", "out.csv"}


def test_options_reach_the_classifier(cells):
    assert run(f"{FIT} --tuning none --batch_key batch") == 0
    assert run(f"{PREDICT} --key_added kind --unassigned_above 0 --cluster_key leiden --quiet") == 0
    written = anndata.read_h5ad("out.h5ad").obs
    assert {"kind", "kind_majority", "kind_by_expression"} <= set(written) and "kind_by_network" not in written
    assert (written["kind"] == "unassigned").mean() > 0.8


def test_what_exists_is_not_replaced_unasked(cells, capsys):
    assert run(f"{FIT} --tuning none") == 0 == run(PREDICT)
    capsys.readouterr()
    assert run(f"{FIT} --tuning none") == 2 == run(PREDICT)
    assert capsys.readouterr().err.count("--overwrite") == 2
    assert run(f"{FIT} --tuning none --overwrite") == 0 == run(f"{PREDICT} --overwrite")


def test_a_stopped_fine_tuning_goes_on(cells, tmp_path, stopped, caplog):
    stopped(f"{FIT} {TUNED}")
    assert (tmp_path / ".classifier.training" / "checkpoints").is_dir() and not (tmp_path / "classifier").exists()
    assert run(f"{FIT} {TUNED}") == 0
    assert any("going on after step" in record.message for record in caplog.records)
    assert not (tmp_path / ".classifier.training").exists()
    assert run(PREDICT) == 0


def test_a_stopped_fine_tuning_that_replaces_another_goes_on(cells, tmp_path, stopped, caplog):
    assert run(f"{FIT} --tuning none") == 0
    stopped(f"{FIT} {TUNED} --overwrite")
    assert run(f"{FIT} {TUNED} --overwrite") == 0
    assert any("going on after step" in record.message for record in caplog.records)


def test_a_fine_tuning_of_other_settings_is_not_gone_on_with(cells, tmp_path, stopped, capsys):
    stopped(f"{FIT} {TUNED}")
    capsys.readouterr()
    assert run(f"{FIT} {TUNED} --seed 5 --overwrite") == 2
    assert "remove .classifier.training to begin anew" in capsys.readouterr().err
    assert (tmp_path / ".classifier.training" / "checkpoints").is_dir()
