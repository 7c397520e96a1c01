from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from annformer.cli import main
from annformer.errors import InputError
from annformer.scgpt import ScGPT
from annformer.tasks.inspection import inspect
from annformer.vocab import GeneVocab


def stops(inspection) -> str:
    return " ".join(finding.text for finding in inspection.findings if finding.weight == "stops")


def odd(inspection) -> str:
    return " ".join(finding.text for finding in inspection.findings if finding.weight == "odd")


@pytest.fixture
def cells(tiny_adata):
    return tiny_adata()


def change(adata, **values: float):
    """Set values of the matrix: cell number -> value of all its genes."""
    dense = adata.X.toarray()
    for cell, value in values.items():
        dense[int(cell[1:])] = value
    adata.X = csr_matrix(dense)
    return adata


def test_good_cells_have_no_findings(cells, tiny_model):
    inspection = inspect(cells, model=tiny_model)
    assert inspection.works
    assert inspection.findings == ()
    assert inspection.facts["values"] == {"taken from": "X", "kind": "counts"}
    assert inspection.facts["genes"]["share"] == pytest.approx(300 / 305)
    assert inspection.facts["obs columns"]["look like a batch"] == ["batch (2)"]
    assert inspection.facts["obs columns"]["look like a cell type"] == ["cell_type (3)"]
    assert inspection.facts["embedding"]["seconds"] > 0


def test_without_a_model_the_shipped_table_counts(cells):
    inspection = inspect(cells, model=None)
    assert inspection.facts["genes"]["share"] == pytest.approx(300 / 305)
    assert "table" in inspection.facts["genes"]["held against"]
    assert "embedding" not in inspection.facts


def test_genes_per_cell_are_those_that_are_known(cells, tiny_vocab):
    known = cells[:, [name in tiny_vocab for name in cells.var_names]].X
    largest = int(np.diff(known.tocsr().indptr).max())
    assert inspect(cells, model=None).facts["cells"]["known genes per cell"]["largest"] == largest


def test_empty_and_double_cells_are_counted_and_named(cells, tiny_model):
    cells.X = csr_matrix(np.vstack([cells.X.toarray()[:-1], cells.X.toarray()[:1]]))
    inspection = inspect(change(cells, c3=0, c7=0), model=tiny_model)
    assert inspection.works
    assert inspection.facts["cells"]["empty"] == 2
    assert "2 cells are empty (cell3, cell7" in odd(inspection)
    assert inspection.facts["cells"]["equal to an earlier cell"] == 1
    assert "cell59" in odd(inspection)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "inf"), (-1.0, "negative")])
def test_values_that_cannot_be_used_stop(cells, value, word):
    inspection = inspect(change(cells, c5=value), model=None)
    assert not inspection.works
    assert word in stops(inspection)
    assert inspection.facts["file"]["cells"] == 60


def test_scaled_values_stop_and_every_matrix_is_named(cells):
    dense = cells.X.toarray()
    cells.layers["shares"] = csr_matrix(dense / (dense.sum(1, keepdims=True) + 1))
    cells.X = dense - dense.mean(0)
    inspection = inspect(cells, model=None)
    assert not inspection.works
    assert inspection.facts["matrices"]["X"].startswith("scaled")
    assert inspection.facts["matrices"]["layers['shares']"].startswith("normalised")


def test_logarithms_are_odd_but_work(cells):
    cells.X = np.log1p(cells.X)
    inspection = inspect(cells, model=None)
    assert inspection.works
    assert inspection.facts["values"]["kind"] == "log-normalised"
    assert "no counts were found" in odd(inspection)


def test_transposed_cells_stop(cells, tiny_model):
    assert "transpose" in stops(inspect(cells.T, model=tiny_model))


def test_a_better_column_is_found(cells, tiny_model):
    cells.var["symbol"] = cells.var_names
    cells.var_names = [name if i % 3 == 0 else f"feature_{i}" for i, name in enumerate(cells.var_names)]
    inspection = inspect(cells, model=tiny_model)
    assert inspection.works
    assert "gene_key='symbol' would match 98%" in odd(inspection)
    cells.var_names = [f"feature_{i}" for i in range(cells.n_vars)]
    assert "symbol" in stops(inspect(cells, model=tiny_model))
    assert inspect(cells, model=tiny_model, gene_key="symbol").findings == ()


@pytest.mark.parametrize("wrong", [{"gene_key": "simbol"}, {"layer": "count"}])
def test_names_that_the_user_got_wrong_are_errors(cells, wrong):
    cells.var["symbol"], cells.layers["counts"] = cells.var_names, cells.X
    with pytest.raises(InputError, match=r"symbol|counts"):
        inspect(cells, model=None, **wrong)


def test_long_cells_are_announced(cells, tiny_model):
    settings = tiny_model.config.tokenizer.with_(max_length=20)
    tiny_model.config = tiny_model.config.model_copy(update={"tokenizer": settings})
    assert "more known genes than fit (19)" in odd(inspect(cells, model=tiny_model))


def test_a_model_folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    facts = inspect(tmp_path / "model").facts
    assert facts["model"]["parameters"] == sum(p.numel() for p in tiny_model.parameters())
    assert facts["vocabulary"] == {"tokens": 303, "genes": 300, "not learned": 0, "first": list(tiny_model.vocab.genes[:5])}
    assert facts["network"]["width"] == 32
    tiny_model.save_for_authors(tmp_path / "theirs", drop=["asked"])
    assert inspect(tmp_path / "theirs").facts["model"]["format"] == "the authors' folder"


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Folder of a checkpoint of the authors that a person put into the cache."""
    monkeypatch.setenv("ANNFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/checkpoints/scgpt-blood"


def test_a_named_checkpoint(tiny_model, named):
    with pytest.raises(InputError, match="scgpt-blood is not on this machine"):
        inspect("scgpt-blood")
    tiny_model.save_for_authors(named, drop=["asked"])
    inspection = inspect("scgpt-blood")
    assert (inspection.source, inspection.what) == ("scgpt-blood", "model")
    assert inspection.facts["model"]["format"] == "the authors' folder"
    assert inspection.facts["model"]["size_bytes"] == sum(path.stat().st_size for path in named.iterdir())


def test_a_model_on_the_hub(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained(tmp_path / "fetched")
    asked = []
    monkeypatch.setattr("annformer.checkpoints.fetch_from_hub", lambda name: (asked.append(name), tmp_path / "fetched")[1])
    assert inspect("some/model-v1.5").facts["vocabulary"]["genes"] == 300
    assert asked == ["some/model-v1.5"]
    with pytest.raises(InputError, match=r"does not exist|no such"):
        inspect("some/cells.h5ad")
    assert asked == ["some/model-v1.5"]


def test_of_two_formats_in_a_folder_it_is_the_one_that_is_loaded(tiny_model, tmp_path):
    tiny_model.save_for_authors(tmp_path / "model", drop=["asked"])
    tiny_model.save_pretrained(tmp_path / "ours")
    for path in (tmp_path / "ours").iterdir():
        path.rename(tmp_path / "model" / path.name)
    facts = inspect(tmp_path / "model").facts
    assert facts["network"]["generative"]
    assert facts["model"]["format"] == "annformer, format 1"


def test_a_model_that_needs_a_batch_stops_an_embedding(cells, tiny_model, tmp_path):
    network = tiny_model.config.model.with_(input_norm="domain", n_batches=2)
    model = ScGPT(tiny_model.config.with_(model=network.model_dump()), tiny_model.vocab)
    inspection = inspect(cells, model=model)
    assert "batch label for every cell" in stops(inspection)
    assert "embedding" not in inspection.facts
    assert inspection.facts["cells"]["known genes per cell"]["largest"] > 0
    model.save_pretrained(tmp_path / "model")
    assert not inspect(tmp_path / "model").works


def test_the_shipped_model_is_the_default(cells, tiny_model, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "ships")
    monkeypatch.setattr("annformer.checkpoints.shipped", lambda name: tmp_path / {"annformer-base": "ships"}[name])
    assert inspect(cells).facts["genes"]["held against"] == "the 300 genes that unnamed has learned"
    assert inspect(cells).facts["embedding"]["seconds"] > 0
    assert inspect("annformer-base").facts["vocabulary"]["genes"] == 300


def test_genes_that_the_model_has_not_learned_are_said(cells, tiny_model):
    model = ScGPT(tiny_model.config, GeneVocab(tiny_model.vocab.tokens, tiny_model.vocab.genes[:20]))
    facts = inspect(cells, model=model).facts
    assert facts["genes"]["held against"] == "the 280 genes that unnamed has learned"
    assert any(line.startswith("20 columns are genes that the model has not learned: left out (") for line in facts["genes"]["match"])
    known = cells[:, [name in tiny_model.vocab.genes[20:] for name in cells.var_names]].X
    assert facts["cells"]["known genes per cell"]["largest"] == int(np.diff(known.tocsr().indptr).max())


def test_lines_and_json_say_the_same(cells, tmp_path, capsys):
    change(cells, c3=0).write_h5ad(tmp_path / "cells.h5ad")
    assert main(["inspect", str(tmp_path / "cells.h5ad"), "--model", "null", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["facts"]["file"]["format"] == "h5ad"
    assert values["works"]
    assert main(["inspect", str(tmp_path / "cells.h5ad"), "--model", "null"]) == 0
    captured = capsys.readouterr()
    assert "cells: 60" in captured.out
    assert values["findings"][0]["text"] in captured.out
    assert captured.err == ""


def test_on_a_terminal_it_is_a_table(cells, capsys):
    from annformer.cli.inspect import _print_rich

    _print_rich(inspect(change(cells, c3=np.nan), model=None))
    out = capsys.readouterr().out
    assert "stops: " in out
    assert "share" in out
