"""Every way of keeping the same cells gives the same batches."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import zarr

from annformer.data import AnnDataSource, CellSource
from annformer.data import readers as readers_module
from annformer.errors import AnnformerWarning, InputError
from annformer.vocab import GeneVocab

Make = Callable[[ad.AnnData, Path], ad.AnnData | Path]


def h5ad(adata: ad.AnnData, folder: Path) -> Path:
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def h5ad_gzip(adata: ad.AnnData, folder: Path) -> Path:
    adata.write_h5ad(folder / "cells.h5ad", compression="gzip")
    return folder / "cells.h5ad"


def zarr_store(adata: ad.AnnData, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata and zarr speak of the next format
        adata.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def zarr_v3(adata: ad.AnnData, folder: Path) -> Path:
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=3):
        warnings.simplefilter("ignore", UserWarning)
        return zarr_store(adata, folder)


def with_x(adata: ad.AnnData, x: object) -> ad.AnnData:
    return ad.AnnData(x, obs=adata.obs, var=adata.var)


def dense(adata: ad.AnnData) -> ad.AnnData:
    return with_x(adata, adata.X.toarray())


def csc(adata: ad.AnnData) -> ad.AnnData:
    return with_x(adata, adata.X.tocsc())


def unsorted(adata: ad.AnnData) -> ad.AnnData:
    x = adata.X.copy()
    for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        order = np.arange(stop - start)[::-1]
        x.indices[start:stop], x.data[start:stop] = x.indices[start:stop][order], x.data[start:stop][order]
    return with_x(adata, sp.csr_matrix((x.data, x.indices, x.indptr), shape=x.shape))


def with_zeros(adata: ad.AnnData) -> ad.AnnData:
    """A matrix that stores some of its zeros."""
    everything = adata.X.toarray()
    return with_x(
        adata, sp.csr_matrix((everything.ravel(), np.tile(np.arange(adata.n_vars), adata.n_obs), np.arange(adata.n_obs + 1) * adata.n_vars))
    )


def in_layer(adata: ad.AnnData) -> ad.AnnData:
    other = with_x(adata, sp.csr_matrix(adata.X.log1p()))
    other.layers["counts"] = adata.X
    return other


def in_raw(adata: ad.AnnData) -> ad.AnnData:
    few = ad.AnnData(adata.X[:, :50].toarray() - 1.0, obs=adata.obs, var=adata.var.iloc[:50])
    few.raw = adata
    return few


def view(adata: ad.AnnData) -> ad.AnnData:
    more = ad.concat([adata, adata[:7]], merge="same", index_unique="-")
    more.obs_names = [*adata.obs_names, *(f"extra{i}" for i in range(7))]
    return more[adata.obs_names, adata.var_names]


def view_raw(adata: ad.AnnData) -> ad.AnnData:
    more = ad.concat([adata[:7], adata], merge="same", index_unique="-")
    more.obs_names = [*(f"extra{i}" for i in range(7)), *adata.obs_names]
    return in_raw(more)[7:]


def backed(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(h5ad(adata, folder), backed="r")


def backed_view(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    more = ad.concat([adata[:7], adata], merge="same", index_unique="-")
    more.obs_names = [*(f"extra{i}" for i in range(7)), *adata.obs_names]
    return backed(more, folder)[7:]


def tenx_v3(adata: ad.AnnData, folder: Path) -> Path:
    with h5py.File(folder / "cells.h5", "w") as file:
        matrix = file.create_group("matrix")
        _write_tenx(matrix, adata)
        features = matrix.create_group("features")
        features["id"] = np.array([f"X{i}" for i in range(adata.n_vars)], "S")
        features["name"] = adata.var_names.to_numpy().astype("S")
        features["feature_type"] = np.array(["Gene Expression"] * adata.n_vars, "S")
        features["genome"] = np.array(["GRCh38"] * adata.n_vars, "S")
        features["_all_tag_keys"] = np.array(["genome"], "S")
    return folder / "cells.h5"


def tenx_v2(adata: ad.AnnData, folder: Path) -> Path:
    with h5py.File(folder / "cells.h5", "w") as file:
        matrix = file.create_group("GRCh38")
        _write_tenx(matrix, adata)
        matrix["genes"] = np.array([f"X{i}" for i in range(adata.n_vars)], "S")
        matrix["gene_names"] = adata.var_names.to_numpy().astype("S")
    return folder / "cells.h5"


def _write_tenx(group: h5py.Group, adata: ad.AnnData) -> None:
    group["barcodes"] = adata.obs_names.to_numpy().astype("S")
    group["shape"] = np.array(adata.shape[::-1], "i4")
    group["data"], group["indices"], group["indptr"] = adata.X.data.astype("i4"), adata.X.indices.astype("i8"), adata.X.indptr.astype("i8")


def mtx_v3(adata: ad.AnnData, folder: Path) -> Path:
    folder = folder / "filtered_feature_bc_matrix"
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, adata.X.T.astype(np.int32))
    features = pd.DataFrame({"id": [f"X{i}" for i in range(adata.n_vars)], "name": adata.var_names, "type": "Gene Expression"})
    features.to_csv(folder / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv.gz", header=False, index=False)
    return folder


def mtx_v2(adata: ad.AnnData, folder: Path) -> Path:
    scipy.io.mmwrite(folder / "matrix.mtx", adata.X.T.astype(np.int32))
    features = pd.DataFrame({"id": [f"X{i}" for i in range(adata.n_vars)], "name": adata.var_names})
    features.to_csv(folder / "genes.tsv", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv", header=False, index=False)
    return folder


def legacy_h5ad(adata: ad.AnnData, folder: Path) -> Path:
    """An h5ad as AnnData 0.6 wrote it: tables are compound arrays."""
    with h5py.File(folder / "cells.h5ad", "w") as file:
        x = file.create_group("raw.X")
        x["data"], x["indices"], x["indptr"] = adata.X.data, adata.X.indices, adata.X.indptr
        x.attrs["h5sparse_format"], x.attrs["h5sparse_shape"] = "csr", adata.shape
        file["X"] = adata.X.toarray() - 1.0
        columns = [("index", "S10"), *((name, "i1") for name in adata.obs)]
        obs = np.zeros(adata.n_obs, dtype=columns)
        obs["index"] = adata.obs_names.to_numpy().astype("S")
        for name in adata.obs:
            obs[name] = adata.obs[name].cat.codes
            file[f"uns/{name}_categories"] = adata.obs[name].cat.categories.to_numpy().astype("S")
        file["obs"] = obs
        file["var"] = file["raw.var"] = np.array([(name,) for name in adata.var_names.to_numpy().astype("S")], dtype=[("index", "S20")])
    return folder / "cells.h5ad"


MAKERS: dict[str, Make] = {
    "memory csr": lambda adata, _: adata,
    "memory csr_array": lambda adata, _: with_x(adata, sp.csr_array(adata.X)),
    "memory csc": lambda adata, _: csc(adata),
    "memory dense": lambda adata, _: dense(adata),
    "memory dense float64": lambda adata, _: with_x(adata, adata.X.toarray().astype(np.float64)),
    "memory integers": lambda adata, _: with_x(adata, adata.X.astype(np.uint16)),
    "memory unsorted": lambda adata, _: unsorted(adata),
    "memory stored zeros": lambda adata, _: with_zeros(adata),
    "memory layer": lambda adata, _: in_layer(adata),
    "memory raw": lambda adata, _: in_raw(adata),
    "memory view": lambda adata, _: view(adata),
    "memory view raw": lambda adata, _: view_raw(adata),
    "backed csr": backed,
    "backed csc": lambda adata, folder: backed(csc(adata), folder),
    "backed dense": lambda adata, folder: backed(dense(adata), folder),
    "backed raw": lambda adata, folder: backed(in_raw(adata), folder),
    "backed view": backed_view,
    "h5ad csr": h5ad,
    "h5ad csr gzip": h5ad_gzip,
    "h5ad csc": lambda adata, folder: h5ad(csc(adata), folder),
    "h5ad dense": lambda adata, folder: h5ad(dense(adata), folder),
    "h5ad layer": lambda adata, folder: h5ad(in_layer(adata), folder),
    "h5ad raw": lambda adata, folder: h5ad(in_raw(adata), folder),
    "h5ad legacy": legacy_h5ad,
    "zarr csr": zarr_store,
    "zarr v3 csr": zarr_v3,
    "zarr csc": lambda adata, folder: zarr_store(csc(adata), folder),
    "zarr dense": lambda adata, folder: zarr_store(dense(adata), folder),
    "10x v3": tenx_v3,
    "10x v2": tenx_v2,
    "mtx v3": mtx_v3,
    "mtx v2": mtx_v2,
}


@pytest.mark.parametrize("form", MAKERS)
@pytest.mark.filterwarnings("ignore:the cells of a view of a backed:annformer.errors.AnnformerWarning")
def test_every_format_gives_the_same_batches(form: str, tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers_module, "BLOCK_VALUES", 2_000)  # several blocks even for so few cells
    adata = tiny_adata(n_obs=53)
    with AnnDataSource(MAKERS[form](adata, tmp_path)) as source:
        assert isinstance(source, CellSource)
        assert source.n_obs == 53
        assert list(source.obs_names) == list(adata.obs_names)
        assert source.counts.kind == "counts"
        batches = list(source.batches(10, vocab=tiny_vocab))
    assert [batch.counts.shape[0] for batch in batches] == [10] * 5 + [3]
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), np.arange(53))
    ids = tiny_vocab.ids(adata.var_names)
    genes = np.flatnonzero(ids >= 0)[np.argsort(ids[ids >= 0])]
    wanted = adata.X.toarray()[:, genes]
    for batch in batches:
        np.testing.assert_array_equal(batch.gene_ids, ids[genes])
        np.testing.assert_array_equal(batch.counts.toarray(), wanted[batch.rows])
        assert batch.counts.data.dtype == np.float32
        fresh = sp.csr_array((batch.counts.data, batch.counts.indices, batch.counts.indptr), shape=batch.counts.shape)
        assert fresh.has_canonical_format
        assert (batch.counts.data > 0).all()


@pytest.mark.parametrize("form", ["memory csr", "backed csr", "h5ad csr", "h5ad csr gzip", "h5ad legacy", "zarr csr"])
def test_labels_survive_every_format(form: str, tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path) -> None:
    adata = tiny_adata()
    with AnnDataSource(MAKERS[form](adata, tmp_path)) as source:
        keys = {"batch": "batch", "cell_type": "cell_type"}
        labels = [batch.labels for batch in source.batches(16, vocab=tiny_vocab, label_keys=keys)]
        for role, column in keys.items():
            codes = np.concatenate([label[role] for label in labels])
            assert [source.categories[role][code] for code in codes] == list(adata.obs[column])


def test_other_features_of_10x_are_left_out(tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path) -> None:
    adata = tiny_adata()
    path = tenx_v3(adata, tmp_path)
    protein = list(adata.var_names).index("CD74")
    with h5py.File(path, "r+") as file:
        types = file["matrix/features/feature_type"][:]
        del file["matrix/features/feature_type"]
        types = types.astype("S20")
        types[protein] = b"Antibody Capture"
        file["matrix/features/feature_type"] = types
    with AnnDataSource(path) as source:
        batch = next(source.batches(10, vocab=tiny_vocab))
    assert tiny_vocab["CD74"] not in batch.gene_ids
    assert len(batch.gene_ids) == 299


def test_csc_on_disk_leaves_no_temporary_files(tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path, monkeypatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    source = AnnDataSource(h5ad(csc(tiny_adata()), tmp_path))
    batches = source.batches(10, vocab=tiny_vocab)
    next(batches)
    assert not any(scratch.iterdir())  # not even while they are in use, so that a kill leaves nothing either


def test_zarr_without_its_chunks_of_zeros(tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path) -> None:
    adata = tiny_adata()
    x = adata.X.toarray()
    x[:, 1:] = 0  # every column number is 0, so that the writer leaves out all of them
    x[:, 0] = np.arange(60) % 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        path = zarr_store(with_x(adata, sp.csr_matrix(x)), tmp_path)
    assert not [file for file in (path / "X/indices").rglob("*") if file.is_file() and not file.name.startswith((".", "zarr"))]
    with AnnDataSource(path) as source:
        batch = next(source.batches(60, vocab=tiny_vocab))
    np.testing.assert_array_equal(batch.counts.toarray().sum(axis=1), x[:, 0])


@pytest.mark.parametrize(("indptr", "fine"), [([0, 1, 2, 4, 6], True), ([0, 2, 2, 4, 6], False), ([0, 1, 1, 4, 6], True)])
def test_a_missing_chunk_is_zeros_only_where_zeros_can_be(indptr: list[int], fine: bool) -> None:
    group = zarr.group({})
    group.attrs.update({"encoding-type": "csr_matrix", "shape": [4, 4]})
    for name, values in (("data", [1, 2, 3, 4, 5, 6]), ("indices", [0, 0, 1, 2, 0, 3]), ("indptr", indptr)):
        group.create_array(name, shape=(len(values),), chunks=(2,), dtype="i4")[:] = np.array(values, "i4")
    assert group["indices"].nchunks_initialized == 2
    if fine:
        np.testing.assert_array_equal(readers_module.reader_of(group).read(0, 4).indices, [0, 0, 1, 2, 0, 3])
    else:
        with pytest.raises(InputError, match="chunks of /indices are missing"):
            readers_module.reader_of(group)


def test_an_mtx_file_is_read_itself(tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path) -> None:
    for prefix, n_obs in (("GSM1_a_", 20), ("GSM2_b_", 30)):
        (tmp_path / prefix).mkdir()
        folder = mtx_v3(tiny_adata(n_obs=n_obs), tmp_path / prefix)
        for file in folder.iterdir():
            file.rename(tmp_path / (prefix + file.name))
    for prefix, n_obs in (("GSM1_a_", 20), ("GSM2_b_", 30)):
        with AnnDataSource(tmp_path / f"{prefix}matrix.mtx.gz") as source:
            np.testing.assert_array_equal(
                next(source.batches(50, vocab=tiny_vocab)).counts.sum(),
                next(AnnDataSource(tiny_adata(n_obs=n_obs)).batches(50, vocab=tiny_vocab)).counts.sum(),
            )
            assert source.n_obs == n_obs


def test_a_view_of_a_backed_anndata_is_a_warning(tiny_adata, tmp_path: Path) -> None:
    with pytest.warns(AnnformerWarning, match="read into memory whole"):
        AnnDataSource(backed_view(tiny_adata(), tmp_path))
