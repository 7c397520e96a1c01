"""`annformer prepare`: words and recipe in, a store and one clear summary out."""

from __future__ import annotations

import numpy as np
import pytest

from annformer.cli import main
from annformer.data.store import StoreSource


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_adata):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    for seed in range(2):
        tiny_adata(30, seed=seed).write_h5ad(tmp_path / "studies" / f"s{seed}.h5ad")
    tiny_adata(20, seed=5).write_h5ad(tmp_path / "other.h5ad")
    tiny_adata(60, seed=1)[:12].copy().write_h5ad(tmp_path / "held.h5ad")
    return tmp_path


def test_many_inputs_make_a_store(capsys):
    assert main(["prepare", "studies", "other.h5ad", "--out", "store", "--seed", "3", "--columns", "cell_type"]) == 0
    out, err = capsys.readouterr()
    assert "80 of 80 cells from 3 data sets" in out
    assert "left out: 0 empty, 0 duplicate, 0 excluded" in out
    assert "other.h5ad: 20 cells" in err
    store = StoreSource("store")
    assert store.manifest.seed == 3
    assert list(store.manifest.columns) == ["study", "cell_type"]
    assert np.bincount(store.codes("study")).tolist() == [30, 30, 20]


def test_excluded_files_stand_behind_their_option(tiny_adata, folder, capsys):
    first = tiny_adata(30, seed=1)
    first[:12].copy().write_h5ad(folder / "held.h5ad")
    assert main(["prepare", "studies", "--exclude", "held.h5ad", "other.h5ad", "--out", "store"]) == 0
    assert "48 of 60 cells" in capsys.readouterr().out
    assert [held.n_found for held in StoreSource("store").manifest.held_out] == [12, 0]


def test_recipe(folder, tiny_vocab, capsys):
    tiny_vocab.to_json(folder / "vocab.json")
    (folder / "recipe.yaml").write_text("exclude: [studies/s1.h5ad]\nvocab: vocab.json\nseed: 4\n")
    assert main(["prepare", "studies/s0.h5ad", "--out", "store", "--config", "recipe.yaml", "--seed", "5"]) == 0
    manifest = StoreSource("store").manifest
    assert manifest.seed == 5
    assert [held.file for held in manifest.held_out] == ["s1.h5ad"]
    assert StoreSource("store").vocab == tiny_vocab


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "--out", "store"], "without FILES"),
        (["prepare", "nowhere.h5ad", "--out", "store"], "nowhere.h5ad does not exist"),
        (["prepare", "studies", "--out", "studies"], "exists already"),
        (["prepare", "studies", "--out", "studies", "--overwrite"], "is not a store"),
        (["prepare", "studies", "studies/s0.h5ad", "--out", "store"], "more than once"),
        (["prepare", "studies", "--out", "no/such/store"], "nothing can be written"),
    ],
)
def test_mistakes(words, said, capsys, folder):
    before = sorted(folder.rglob("*"))
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
