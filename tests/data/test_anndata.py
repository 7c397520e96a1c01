from __future__ import annotations

import tracemalloc
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annformer.data import AnnDataSource
from annformer.data import readers as readers_module
from annformer.errors import AnnformerWarning
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab


def read(source: AnnDataSource, vocab: GeneVocab, size: int = 16, **options: object) -> list[CellBatch]:
    return list(source.batches(size, vocab=vocab, **options))


def together(batches: list[CellBatch]) -> np.ndarray:
    return np.concatenate([batch.counts.toarray() for batch in batches])


def test_columns_of_one_gene_are_added(tiny_adata, tiny_vocab: GeneVocab) -> None:
    adata = tiny_adata()
    renamed = adata.copy()
    first, second = (list(adata.var_names).index(gene) for gene in ("CD74", "LYZ"))
    names = adata.var_names.to_numpy().copy()
    names[second] = "CD74"
    with pytest.warns(UserWarning, match="not unique"):
        renamed = ad.AnnData(adata.X, obs=adata.obs, var=pd.DataFrame(index=names))
    source = AnnDataSource(renamed)
    batch = read(source, tiny_vocab, 60)[0]
    place = list(batch.gene_ids).index(tiny_vocab["CD74"])
    np.testing.assert_array_equal(batch.counts.toarray()[:, place], adata.X[:, [first, second]].sum(axis=1).A1)
    assert tiny_vocab["LYZ"] not in batch.gene_ids
    assert batch.counts.data.dtype == np.float32
    assert source.match(tiny_vocab).report().collapsed["CD74"]


def test_log_values_of_one_gene_are_added_as_counts(tiny_adata, tiny_vocab: GeneVocab) -> None:
    adata = tiny_adata()
    first, second = (list(adata.var_names).index(gene) for gene in ("CD74", "LYZ"))
    counts = adata.X.toarray() * 3.7
    names = adata.var_names.to_numpy().copy()
    names[second] = "cd74"
    source = AnnDataSource(ad.AnnData(sp.csr_matrix(np.log1p(counts)), obs=adata.obs, var=pd.DataFrame(index=names)))
    assert source.counts.kind == "log-normalised"
    assert "added before the logarithm" in source.counts.note
    batch = read(source, tiny_vocab, 60)[0]
    place = list(batch.gene_ids).index(tiny_vocab["CD74"])
    np.testing.assert_allclose(batch.counts.toarray()[:, place], np.log1p(counts[:, first] + counts[:, second]), rtol=1e-6)


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_and_start(on_disk: bool, tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path) -> None:
    adata = tiny_adata()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = AnnDataSource(tmp_path / "cells.h5ad" if on_disk else adata)
    everything = together(read(source, tiny_vocab))
    rows = np.array([5, 6, 7, 40, 3, 3, 59, 0])
    some = read(source, tiny_vocab, 3, rows=rows, label_keys={"batch": "batch"})
    np.testing.assert_array_equal(together(some), everything[rows])
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in some]), rows)
    codes = np.concatenate([batch.labels["batch"] for batch in some])
    assert [source.categories["batch"][code] for code in codes] == list(adata.obs["batch"].iloc[rows])
    rest = read(source, tiny_vocab, 16, start=37)
    assert rest[0].rows[0] == 37
    np.testing.assert_array_equal(together(rest), everything[37:])
    np.testing.assert_array_equal(together(read(source, tiny_vocab, 3, rows=rows, start=5)), everything[rows[5:]])
    assert read(source, tiny_vocab, start=60) == []
    assert read(source, tiny_vocab, rows=np.array([], dtype=int)) == []


def test_gene_key(tiny_adata, tiny_vocab: GeneVocab) -> None:
    adata = tiny_adata()
    wanted = together(read(AnnDataSource(adata), tiny_vocab))
    adata.var["symbol"] = pd.Categorical(adata.var_names)
    adata.var_names = [f"feature{i}" for i in range(adata.n_vars)]
    np.testing.assert_array_equal(together(read(AnnDataSource(adata, gene_key="symbol"), tiny_vocab)), wanted)


def test_gene_key_is_taken_from_raw_when_raw_is_read(tiny_adata, tiny_vocab: GeneVocab) -> None:
    adata = tiny_adata()
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"feature{i}" for i in range(adata.n_vars)]
    few = ad.AnnData(adata.X[:, :20].toarray() - 1.0, obs=adata.obs, var=pd.DataFrame({"symbol": ["?"] * 20}, index=adata.var_names[:20]))
    few.raw = adata
    source = AnnDataSource(few, gene_key="symbol")
    assert source.counts.where == ".raw.X"
    assert read(source, tiny_vocab)[0].counts.shape[1] == 300


def test_label_columns_of_any_type(tiny_adata, tiny_vocab: GeneVocab) -> None:
    adata = tiny_adata(n_obs=4)
    adata.obs["number"] = [10, 2, 10, 2]
    adata.obs["flag"] = [True, False, True, True]
    adata.obs["text"] = ["b", "a", "b", "c"]
    adata.obs["unused"] = pd.Categorical(["x", "y", "x", "x"], categories=["z", "y", "x"])
    source = AnnDataSource(adata)
    for column in ("number", "flag", "text", "unused"):
        codes = read(source, tiny_vocab, label_keys={"role": column})[0].labels["role"]
        assert codes.dtype == np.int64
        assert [source.categories["role"][code] for code in codes] == [str(value) for value in adata.obs[column]]
    assert source.categories["role"] == ("y", "x")


def test_double_obs_names_are_a_warning(tiny_adata) -> None:
    adata = tiny_adata()
    adata.obs_names = ["same"] * adata.n_obs
    with pytest.warns(AnnformerWarning, match="59 of 60 cells have the name of another cell"):
        AnnDataSource(adata)


def test_fractions_after_whole_numbers_are_a_warning(tiny_vocab: GeneVocab, tiny_adata, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = tiny_adata()
    adata.X.data[-1] = 1.5
    monkeypatch.setattr(readers_module, "SAMPLE_VALUES", 10)
    adata.X.data[: len(adata.X.data) // 2 - 100], adata.X.data[-50] = 1, 1.5
    adata.X.data[-10:] = 1
    source = AnnDataSource(adata)
    assert source.counts.kind == "counts"
    with pytest.warns(AnnformerWarning, match="hold fractions"):
        batches = read(source, tiny_vocab)
    assert 1.5 in together(batches)


def test_results_do_not_depend_on_blocks_and_batch_sizes(tiny_adata, tiny_vocab: GeneVocab, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = tiny_adata()
    wanted = together(read(AnnDataSource(adata), tiny_vocab, 60))
    for block in (1, 1_000, 10_000):
        monkeypatch.setattr(readers_module, "BLOCK_VALUES", block)
        for size in (1, 7, 100):
            np.testing.assert_array_equal(together(read(AnnDataSource(adata), tiny_vocab, size)), wanted)


def test_input_is_left_alone(tiny_adata, tiny_vocab: GeneVocab) -> None:
    adata = tiny_adata()
    before = adata.copy()
    read(AnnDataSource(adata), tiny_vocab, label_keys={"batch": "batch"})
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert not adata.uns


def test_describe(tiny_adata) -> None:
    adata = tiny_adata()
    x = adata.X.tolil()
    x[3] = 0
    x[7] = x[8]
    adata.X = x.tocsr()
    adata.layers["scaled"] = adata.X.toarray() - 1
    adata.obs["n_counts"] = adata.X.sum(axis=1).A1
    adata.obs["leiden"] = np.arange(60) % 4 + 0.0
    adata.var["symbol"] = adata.var_names
    told = AnnDataSource(adata).describe(scan=True)
    assert (told["format"], told["n_obs"], told["n_vars"], told["stored"], told["dtype"]) == ("AnnData", 60, 305, "by rows", "float32")
    assert told["nonzero_share"] == pytest.approx(adata.X.nnz / (60 * 305))
    assert told["counts"] == {"where": "X", "kind": "counts", "note": ""}
    assert {matrix["where"]: matrix["kind"] for matrix in told["matrices"]} == {"X": "counts", "layers['scaled']": "scaled"}
    looks = {column["name"]: column["looks_like"] for column in told["obs_columns"]}
    assert looks == {"batch": "batch", "cell_type": "cell_type", "n_counts": "", "leiden": "cell_type"}
    assert told["gene_columns"] == ["symbol"]
    assert (told["n_empty_cells"], told["first_empty_cells"]) == (1, ["cell3"])
    assert (told["n_duplicate_cells"], told["first_duplicate_cells"]) == (1, ["cell8"])
    assert told["genes_per_cell"]["max"] == np.diff(adata.X.indptr).max()
    assert told["total_per_cell"]["median"] == np.median(adata.X.sum(axis=1).A1)


def write_big_h5ad(path: Path, adata: ad.AnnData, n_obs: int, *, by: str) -> int:
    """Repeat the cells of `adata` without ever holding them; return the bytes of the matrix."""
    times = n_obs // adata.n_obs
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_obs)])
    empty = (sp.csr_matrix if by == "rows" else sp.csc_matrix)((n_obs, adata.n_vars), dtype=np.float32)
    ad.AnnData(empty, obs=obs, var=adata.var).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        x = file["X"]
        for name in ("data", "indices", "indptr"):
            del x[name]
        n_values = adata.X.nnz * times
        data = x.create_dataset("data", (n_values,), "f4", chunks=(10_000,))
        indices = x.create_dataset("indices", (n_values,), "i4", chunks=(10_000,))
        if by == "rows":
            for i in range(times):
                part = slice(i * adata.X.nnz, (i + 1) * adata.X.nnz)
                data[part], indices[part] = adata.X.data, adata.X.indices
            lengths = np.tile(np.diff(adata.X.indptr), times)
        else:
            columns, at = adata.X.tocsc(), 0
            for start, stop in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
                part = slice(at, at := at + (stop - start) * times)
                data[part] = np.tile(columns.data[start:stop], times)
                indices[part] = (columns.indices[start:stop] + adata.n_obs * np.arange(times)[:, None]).ravel()
            lengths = np.diff(columns.indptr) * times
        x["indptr"] = np.concatenate([[0], np.cumsum(lengths)])
    return 8 * n_values


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_memory_stays_flat_on_disk(by: str, tiny_adata, tiny_vocab: GeneVocab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "BLOCK_VALUES", 2**16)
    adata, peaks = tiny_adata(200), []
    total = adata.X.sum()
    for n_obs in (400, 20_000):  # the first also compiles what has to be
        size = write_big_h5ad(tmp_path / f"{n_obs}.h5ad", adata, n_obs, by=by)
        with AnnDataSource(tmp_path / f"{n_obs}.h5ad") as source:
            assert len(source.obs_names) == n_obs
            tracemalloc.start()
            n_read, n_counted = 0, 0.0
            for batch in source.batches(64, vocab=tiny_vocab):
                n_read += batch.counts.shape[0]
                n_counted += float(batch.counts.sum())
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert n_read == n_obs
        unknown = tiny_vocab.ids(adata.var_names) < 0
        assert n_counted == (total - adata.X[:, unknown].sum()) * (n_obs // 200)
    assert peaks[1] < size / 5, f"{peaks[1] / 1e6:.1f} MB for a matrix of {size / 1e6:.0f} MB"
