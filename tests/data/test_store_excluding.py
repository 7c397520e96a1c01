"""Cells that do not get into a store: empty ones, duplicates, those of held-out studies."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError


def test_duplicate_and_empty_cells_are_dropped(tmp_path, tiny_adata):
    adata = tiny_adata(40)
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(40) != 3)[:, None])
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = adata[[7, 9, 11]].copy()[:, ::-1].copy()
    again.obs_names = ["x", "y", "z"]
    again.write_h5ad(tmp_path / "b.h5ad")
    manifest = write_store([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "store")
    first, second = manifest.sources
    assert (first.n_empty, first.n_kept) == (1, 39)
    assert (second.n_duplicates, second.n_kept) == (3, 0)
    assert StoreSource(tmp_path / "store").n_obs == 39


class TestExclude:
    def test_cells_are_recognised_over_shared_genes(self, tmp_path, tiny_adata):
        """The held-out file has fewer genes, other names of cells, and one gene counted otherwise."""
        rng = np.random.default_rng(0)
        adata = tiny_adata(60)
        adata.X = sp.csr_matrix(rng.poisson(1.5, adata.shape).astype(np.float32))
        adata.write_h5ad(tmp_path / "p.h5ad")
        held = adata[10:25, rng.permutation(adata.n_vars)[:250]].copy()
        held.X = sp.csr_matrix(np.hstack([np.full((15, 1), 99), held.X.toarray()[:, 1:]]).astype(np.float32))
        held.obs_names = [f"other{i}" for i in range(held.n_obs)]
        held.write_h5ad(tmp_path / "e.h5ad")
        manifest = write_store([tmp_path / "p.h5ad"], tmp_path / "store", exclude=[tmp_path / "e.h5ad"])
        store = StoreSource(tmp_path / "store")
        assert manifest.sources[0].n_excluded == 15
        assert manifest.sources[0].found_in == {"e": 15}
        assert manifest.held_out[0].n_found == 15
        assert sorted(store.codes("row").tolist()) == [*range(10), *range(25, 60)]

    def test_other_cells_stay(self, files, tmp_path, tiny_adata):
        tiny_adata(50, seed=77).write_h5ad(tmp_path / "e.h5ad")
        assert write_store(files, tmp_path / "store", exclude=[tmp_path / "e.h5ad"]).n_cells == 160

    def test_nothing_left(self, files, tmp_path):
        with pytest.raises(InputError, match="no cell is left"):
            write_store(files[:1], tmp_path / "store", exclude=[write_copy(files[0])])
        assert not list(tmp_path.glob("store*"))


def write_copy(path: Path) -> Path:
    copy = path.with_name("copy.h5ad")
    adata = ad.read_h5ad(path)
    adata.X = sp.csr_matrix(np.where(adata.X.toarray() > 0, adata.X.toarray(), 0))
    adata.write_h5ad(copy)
    return copy
