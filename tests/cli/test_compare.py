from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import annotation_callers
from annformer.cli import compare as module
from annformer.cli import main
from annformer.comparison import TASKS, annotate, integrate
from comparison_cells import N_CELLS, quick, some_cells, table_of

WORDS = "compare integrate cells.h5ad --batch_key batch --label_key cell_type --model model --seeds 2 --out out"


@pytest.fixture
def cells(tiny_adata, tiny_model, tmp_path, monkeypatch) -> ad.AnnData:
    """In a folder with `cells.h5ad` and `model/`; the methods are planted."""
    monkeypatch.chdir(tmp_path)
    cells = some_cells(tiny_adata)
    cells.write_h5ad("cells.h5ad")
    tiny_model.save_pretrained("model")
    quick(monkeypatch)
    monkeypatch.setattr(integrate, "methods", lambda *_, **__: table_of(cells, 6.0, {"PCA HVG": 1.0}))
    return cells


def test_every_task_has_its_function():
    from importlib import import_module

    assert all(callable(import_module(home).compare) for home in TASKS.values())


def test_the_folder_holds_page_cells_and_numbers(cells, tmp_path, capsys):
    assert main(WORDS.split()) == 0
    out = capsys.readouterr().out
    assert "annformer fine-tuned" in out
    assert "On these cells annformer fine-tuned beats the best baseline, PCA HVG" in " ".join(out.split())
    assert "out/report.html" in out
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == sorted(module.FILES)
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model", "out"}
    adata = ad.read_h5ad(folder / "integrated.h5ad")
    assert set(adata.obsm) == {"X_annformer", "X_pca_hvg"}
    assert adata.obsm["X_annformer"].shape[0] == N_CELLS
    assert (adata.X != cells.X).nnz == 0
    scores = pd.read_csv(folder / "scores.csv")
    assert scores["method"].value_counts().to_dict() == {"annformer fine-tuned": 2, "PCA HVG": 1, "shuffled cells": 1}
    html = (folder / "report.html").read_text()
    assert f"annformer {WORDS.partition(' --batch')[0]} --out out --batch_key batch" in html
    assert f"{scores.set_index('method').loc['PCA HVG', 'overall']:.3f}" in html


def test_the_command_on_the_page_is_that_which_was_given():
    options = {"out": "my out", "seeds": 3, "methods": ["zero-shot", "PCA HVG"], "layer": None}
    assert module.spelt("integrate", "a.h5ad", options) == (
        "annformer compare integrate a.h5ad --out 'my out' --seeds 3 --methods zero-shot 'PCA HVG'"
    )


def test_words_reach_the_work(cells, monkeypatch):
    asked = {}

    def compare(adata, **options):
        asked.update(options | {"n": adata.n_obs})
        raise KeyboardInterrupt

    monkeypatch.setattr(integrate, "compare", compare)
    words = "--methods zero-shot pca-hvg --layer X --recipe mine.yaml --device cpu --threads 2"
    assert main([*WORDS.split(), *words.split()]) == 2
    assert asked.pop("command").endswith("--methods zero-shot pca-hvg --layer X --device cpu --threads 2")
    wanted = {"wanted": ["zero-shot", "pca-hvg"], "layer": "X", "gene_key": None, "recipe": "mine.yaml", "device": "cpu", "threads": 2}
    keys = {"batch_key": "batch", "label_key": "cell_type", "model": "model", "seeds": range(2), "name": "cells.h5ad", "n": N_CELLS}
    assert str(asked.pop("folder")) == ".out.comparing"
    assert asked == wanted | keys


def test_what_is_stopped_shows_no_result_and_goes_on(cells, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("annformer.comparison.page.write_page", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(WORDS.split()) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model", ".out.comparing"}
    no_work = {name: replace(method, make=None) for name, method in integrate.methods().items()}
    monkeypatch.setattr(integrate, "methods", lambda *_, **__: no_work)
    assert main(WORDS.split()) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model", "out"}


def test_what_was_stopped_is_forgotten_on_demand(cells, tmp_path):
    (tmp_path / ".out.comparing").mkdir()
    (tmp_path / ".out.comparing" / "rubbish.npz").touch()
    assert main([*WORDS.split(), "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model", "out"}


def test_a_folder_in_use_is_refused_before_the_work_begins(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(integrate, "compare", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").touch()
    assert main(WORDS.split()) == 2
    assert "not the folder of an earlier comparison" in capsys.readouterr().err
    (tmp_path / "out" / "thesis.docx").rename(tmp_path / "out" / "report.html")
    assert main(WORDS.split()) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_an_earlier_comparison_of_a_zarr_folder_is_replaced_on_demand(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("annformer.comparison.page.write_page", lambda found, path: path.write_text(found.sentence))
    (tmp_path / "out").mkdir()
    for name in module.FILES:
        (tmp_path / "out" / name).write_text("old")
    cells.write_zarr(tmp_path / "cells.zarr")
    assert main([*WORDS.replace("cells.h5ad", "cells.zarr").split(), "--overwrite"]) == 0
    assert "X_annformer" in ad.read_h5ad(tmp_path / "out" / "integrated.h5ad").obsm
    assert np.isfinite(pd.read_csv(tmp_path / "out" / "verdicts.csv")["low"]).all()


@pytest.fixture
def typed(cells, monkeypatch) -> ad.AnnData:
    """The same folder; what annotates is planted."""
    annotation_callers.quick(monkeypatch)
    monkeypatch.setattr(annotate, "methods", lambda *_, **__: annotation_callers.table_of(cells, 0.95, {"kNN PCA": 0.6}))
    return cells


def test_annotation_has_its_own_files(typed, tmp_path, capsys):
    words = "compare annotate cells.h5ad --label_key cell_type --batch_key batch --model model --seeds 2 --out out"
    assert main(words.split()) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "On these cells annformer beats the best baseline, kNN PCA, in macro-F1" in out
    assert "out/report.html (also out/scores.csv, out/verdicts.csv, out/per_type.csv, out/predictions.csv" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(module.FILES_OF["annotate"])
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert set(scores["split"]) == {"whole batches", "random cells"}
    html = (tmp_path / "out" / "report.html").read_text()
    asked = (
        "annformer compare annotate cells.h5ad --out out --batch_key batch --label_key cell_type --model model --recipe annotate --seeds 2"
    )
    assert f"<code>{asked}</code>" in html


def test_an_earlier_comparison_of_another_task_is_not_replaced(typed, tmp_path, capsys):
    words = "compare annotate cells.h5ad --label_key cell_type --model model --seeds 1 --out out --overwrite"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "integrated.h5ad").touch()
    assert main(words.split()) == 2
    assert "not the folder of an earlier comparison" in capsys.readouterr().err


def test_words_of_annotation_reach_the_work(typed, monkeypatch):
    asked = {}

    def compare(adata, **options):
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(annotate, "compare", compare)
    assert (
        main(["compare", "annotate", "cells.h5ad", "--label_key", "cell_type", "--model", "model", "--out", "out", "--novelty", "false"])
        == 2
    )
    assert asked.pop("command").endswith("--recipe annotate --seeds 3 --novelty false")
    assert (asked["batch_key"], asked["novelty"], asked["recipe"], asked["wanted"]) == (None, False, "annotate", None)
