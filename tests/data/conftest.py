"""Studies that the tests of stores are made of."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import pytest

from store_cells import write_mtx


@pytest.fixture
def files(tmp_path, tiny_adata) -> list[Path]:
    """Three studies: h5ad with labels, a zarr store with other genes, an mtx folder."""
    blood, lung, skin = tiny_adata(80, seed=1), tiny_adata(50, seed=2)[:, 40:].copy(), tiny_adata(30, seed=3)
    blood.obs["tissue"] = "blood"
    blood.write_h5ad(tmp_path / "blood.h5ad")
    with ad.settings.override(zarr_write_format=3):
        lung.write_zarr(tmp_path / "lung.zarr")
    write_mtx(skin, tmp_path / "skin")
    return [tmp_path / name for name in ("blood.h5ad", "lung.zarr", "skin")]
