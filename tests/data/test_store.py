"""The store: what goes in comes out, once, in an order of its own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from annformer.data import AnnDataSource, CellSource
from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from store_cells import cells_of, content, hashes


def test_all_cells_come_back_shuffled(files, tmp_path):
    manifest = write_store(files, tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    assert isinstance(store, CellSource)
    assert store.n_obs == manifest.n_cells == 160
    cells = content(store.rows(np.arange(160)), store.vocab)
    put_in = cells_of(files, store.vocab)
    assert sorted(cells) == sorted(put_in)
    assert cells != put_in
    studies = store.codes("source")
    assert len(set(studies[:40].tolist())) == 3, "the studies are not mixed"
    assert list(map(len, cells)) == store.lengths.tolist()
    assert manifest.n_values == store.lengths.sum()


def test_labels_and_origin(files, tmp_path):
    write_store(files, tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    batch = store.rows([5, 0, 77], label_keys={"where": "tissue", "batch": "study"})
    assert set(store.categories["where"]) == {"blood", "unknown"}
    assert store.categories["batch"] == ("blood", "lung", "skin")
    names = store.names([5, 0, 77])
    for i, name in enumerate(names):
        file, row = name.split(":")
        path = next(path for path in files if path.name == file)
        assert store.categories["batch"][batch.labels["batch"][i]] == path.stem
        assert store.categories["where"][batch.labels["where"][i]] == ("blood" if path.stem == "blood" else "unknown")
        original = next(AnnDataSource(path).batches(1, vocab=store.vocab, rows=np.array([int(row)])))
        assert content(original, store.vocab) == content(store.rows([[5, 0, 77][i]]), store.vocab)
    with pytest.raises(InputError, match="tissue"):
        store.codes("tisue")


@pytest.mark.parametrize("memory_gb", [2e-5, 1e-4])
def test_order_depends_on_content_and_seed_only(files, tmp_path, memory_gb):
    write_store(files, tmp_path / "whole")
    manifest = write_store(files[::-1], tmp_path / "parts", memory_gb=memory_gb, shard_bytes=20_000)
    assert len(manifest.shards) > 3
    whole, parts = StoreSource(tmp_path / "whole"), StoreSource(tmp_path / "parts")
    every = np.arange(whole.n_obs)
    assert content(whole.rows(every), whole.vocab) == content(parts.rows(every), parts.vocab)
    write_store(files, tmp_path / "seeded", seed=1)
    seeded = StoreSource(tmp_path / "seeded")
    assert content(whole.rows(every), whole.vocab) != content(seeded.rows(every), seeded.vocab)


def test_bytes_repeat(files, tmp_path):
    for name in ("a", "b"):
        write_store(files, tmp_path / name, memory_gb=2e-5)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_genes_meet_under_approved_names(tmp_path, tiny_adata):
    for name, old in (("a", {}), ("b", {"TMEM123": "KCT3", "SKP1": "SKP1A", "NEDD8": "nedd8"})):
        adata = tiny_adata(20, seed=len(name + str(old)))
        adata.var_names = [old.get(gene, gene) for gene in adata.var_names]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    manifest = write_store([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "store")
    vocab = StoreSource(tmp_path / "store").vocab
    assert {"TMEM123", "SKP1", "NEDD8"} <= set(vocab.genes)
    assert not {"KCT3", "SKP1A", "nedd8"} & set(vocab.genes)
    assert list(vocab.genes) == sorted(vocab.genes)
    assert manifest.sources[1].genes["by_how"].keys() >= {"case"}
    table = pd.read_csv(tmp_path / "store" / "genes.tsv", sep="\t", keep_default_na=False)
    assert table.gene.tolist() == list(vocab.genes)
    cells = StoreSource(tmp_path / "store").rows(np.arange(manifest.n_cells))
    assert table.n_cells.tolist() == np.bincount(cells.counts.indices, minlength=len(vocab))[table.id].tolist()
    assert table.total.sum() == cells.counts.sum()
    assert manifest.n_genes == (table.n_cells > 0).sum()
