"""`annformer map`: subcommands, files, what is replaced."""

from __future__ import annotations

import shlex

import anndata
import pandas as pd
import pytest

from annformer.cli import SUBCOMMANDS, main

FIT = "map fit ref.h5ad --label_key cell_type --model model --out index --n_neighbours 5 --threads 1"
PREDICT = "map predict query.h5ad --index index --out out.h5ad --threads 1"


@pytest.fixture
def cells(tiny_adata, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_adata(80, seed=1).write_h5ad("ref.h5ad")
    tiny_adata(30, seed=2).write_h5ad("query.h5ad")
    tiny_model.save_pretrained("model")


def run(line: str) -> int:
    return main(shlex.split(line))


def test_from_reference_to_labels(cells, tmp_path, capsys):
    assert run(FIT) == 0
    assert "index: 80 cells of 3 types (B cell, T cell, monocyte)" in capsys.readouterr().out
    assert run(PREDICT) == 0
    out = capsys.readouterr().out
    assert "out.h5ad: obs['mapped_cell_type'] of 30 cells: " in out
    written, table = anndata.read_h5ad("out.h5ad").obs, pd.read_csv("out.csv", index_col="cell")
    assert f"median share {table['mapped_cell_type_share'].median():.2f}, median novelty" in out
    assert list(table.columns) == [f"mapped_cell_type{end}" for end in ("", "_share", "_distance", "_novelty")]
    pd.testing.assert_frame_equal(
        table, written[table.columns].astype({"mapped_cell_type": table.dtypes.iloc[0]}), check_dtype=False, check_names=False
    )
    assert {path.name for path in tmp_path.iterdir()} == {"ref.h5ad", "query.h5ad", "model", "index", "out.h5ad", "out.csv"}


def test_options_reach_the_mapper(cells):
    assert run(FIT) == 0
    assert run(f"{PREDICT} --key_added kind --unassigned_above 0 --quiet") == 0
    written = anndata.read_h5ad("out.h5ad").obs
    assert {"kind", "kind_share"} <= set(written)
    assert (written["kind"] == "unassigned").mean() > 0.9


def test_an_index_grows(cells, tiny_adata, capsys):
    assert run(FIT) == 0
    more = tiny_adata(20, seed=3)
    more.obs["cell_type"] = "platelet"
    more.write_h5ad("more.h5ad")
    assert run("map add more.h5ad --index index --threads 1") == 0
    said = capsys.readouterr()
    assert "more.h5ad: 20 cells added\nindex: 100 cells of 4 types" in said.out
    assert "labels that the reference did not have: 'platelet'" in said.err
    assert run(PREDICT) == 0


def test_an_embedding_in_the_files_is_used(cells, capsys):
    assert run("embed ref.h5ad --model model --out ref2.h5ad") == 0
    assert run("embed query.h5ad --model model --out query2.h5ad") == 0
    assert run(FIT.replace("ref.h5ad", "ref2.h5ad") + " --embedding X_annformer") == 0
    assert run(PREDICT.replace("query.h5ad", "query2.h5ad") + " --embedding X_annformer") == 0
    again = anndata.read_h5ad("out.h5ad").obs
    assert run(PREDICT + " --overwrite") == 0
    written = anndata.read_h5ad("out.h5ad").obs
    pd.testing.assert_frame_equal(written, again, atol=1e-5)


@pytest.mark.parametrize("taken", ["out.h5ad", "out.csv"])
def test_outputs_are_replaced_only_when_told(cells, tmp_path, capsys, taken):
    assert run(FIT) == 0
    assert run(FIT) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(FIT + " --overwrite") == 0
    (tmp_path / taken).write_text("mine")
    assert run(PREDICT) == 2
    assert f"{taken}" in capsys.readouterr().err
    assert (tmp_path / taken).read_text() == "mine"
    assert run(PREDICT + " --overwrite") == 0
    assert len(pd.read_csv("out.csv")) == 30


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_a_command_with_subcommands_names_them(words, capsys):
    for name, inner in SUBCOMMANDS.items():
        assert main([name, *words]) == 0
        out = capsys.readouterr().out
        assert f"usage: annformer {name} COMMAND" in out
        assert all(f"  {verb} " in out and caption in out for verb, caption in inner.items())


def test_an_unknown_subcommand_names_the_near_one(capsys):
    assert main(["map", "predikt"]) == 2
    err = capsys.readouterr().err
    assert "annformer map: error: there is no command 'predikt'" in err
    assert "did you mean predict?" in err
