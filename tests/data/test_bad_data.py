"""Everything that can be wrong with the data is one message: found, expected, what to do."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annformer.data import AnnDataSource
from annformer.errors import InputError
from annformer.vocab import GeneVocab


@pytest.fixture
def refused(tiny_vocab: GeneVocab) -> Callable[..., str]:
    """Open and read everything; return the message of the InputError, checked for its form."""

    def run(data: object, label_keys: dict[str, str] | None = None, **options: object) -> str:
        with pytest.raises(InputError) as caught, AnnDataSource(data, **options) as source:
            list(source.batches(16, vocab=tiny_vocab, label_keys=label_keys))
        message = str(caught.value)
        assert "\n  expected: " in message
        assert "\n  what to do: " in message
        return message

    return run


@pytest.fixture
def path(tiny_adata, tmp_path: Path) -> Path:
    tiny_adata().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_missing_file_with_near_miss(refused, path: Path) -> None:
    assert f"did you mean {path}" in refused(path.with_name("cell.h5ad"))
    assert "check the path" in refused("/nowhere/at/all.h5ad")


def test_truncated_file(refused, path: Path) -> None:
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.01):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "seems damaged or incomplete" in refused(path)


def test_damaged_chunk(refused, tiny_adata, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    tiny_adata().write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\0" * chunk.size)
    assert "seems damaged or incomplete" in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cell,gene\n1,2\n", "is not an HDF5 file"),
        (b"", "it is empty"),
        (gzip.compress(b"x" * 100, mtime=0), "gunzip"),
        (b"PK\3\4....", "zip archive"),
    ],
)
def test_not_an_hdf5_file(refused, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "cells.h5ad").write_bytes(content)
    assert said in refused(tmp_path / "cells.h5ad")


def test_hdf5_without_cells(refused, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = [1, 2]
    assert "has no obs and no var (it holds numbers)" in refused(tmp_path / "other.h5")


def test_mudata_and_several_genomes(refused, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        file.create_group("mod/rna")
    assert "MuData" in refused(tmp_path / "cells.h5mu")
    with h5py.File(tmp_path / "both.h5", "w") as file:
        for genome in ("hg19", "mm10"):
            file[f"{genome}/barcodes"] = file[f"{genome}/gene_names"] = np.array([b"x"])
    assert "several genomes: hg19, mm10" in refused(tmp_path / "both.h5")


def test_folder_without_cells(refused, tmp_path: Path) -> None:
    assert "a folder without a zarr store" in refused(tmp_path)
    (tmp_path / "matrix.mtx").write_text("")
    assert "has no *features.tsv.gz or *features.tsv or *genes.tsv.gz" in refused(tmp_path)


def test_mtx_that_does_not_fit_its_tables(refused, tmp_path: Path) -> None:
    (tmp_path / "features.tsv").write_text("X1\tACTB\nX2\tB2M\n")
    (tmp_path / "barcodes.tsv").write_text("c1\nc2\nc3\n")
    matrix = "%%MatrixMarket matrix coordinate integer general\n{} 1\n1 1 5\n"
    (tmp_path / "matrix.mtx").write_text(matrix.format("5 3"))
    assert "shape (5, 3), features.tsv 2 lines, barcodes.tsv 3 lines" in refused(tmp_path)
    (tmp_path / "matrix.mtx").write_text("not a matrix")
    assert "seems damaged" in refused(tmp_path)


def test_mtx_file_without_its_tables(refused, tmp_path: Path) -> None:
    (tmp_path / "features.tsv").write_text("X1\tACTB\n")
    (tmp_path / "barcodes.tsv").write_text("c1\n")
    for name in ("GSM1_matrix.mtx", "cells.mtx"):
        (tmp_path / name).write_text("%%MatrixMarket matrix coordinate integer general\n1 1 1\n1 1 5\n")
    assert "there is no GSM1_features.tsv.gz or GSM1_features.tsv or GSM1_genes" in refused(tmp_path / "GSM1_matrix.mtx")
    assert "a name that ends in matrix.mtx" in refused(tmp_path / "cells.mtx")


def test_other_types(refused) -> None:
    assert "data of type ndarray" in refused(np.ones((2, 2)))


def test_without_x(refused, tiny_adata, tmp_path: Path) -> None:
    adata = tiny_adata()
    adata.layers["mine"] = adata.X
    adata.X = None
    assert "no X and no .raw, only layers['mine']" in refused(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert "name the layer" in refused(tmp_path / "cells.h5ad")
    del adata.layers["mine"]
    assert "add the counts as X" in refused(adata)


@pytest.mark.parametrize("axis", ["obs", "var"])
def test_tables_of_another_length(refused, path: Path, axis: str) -> None:
    with h5py.File(path, "r+") as file:
        names = file[f"{axis}/_index"][:-2]
        attrs = dict(file[f"{axis}/_index"].attrs)
        del file[f"{axis}/_index"]
        file[f"{axis}/_index"] = names
        file[f"{axis}/_index"].attrs.update(attrs)
    assert "X of" in (message := refused(path))
    assert ("obs has 58 rows and var 305" if axis == "obs" else "obs has 60 rows and var 303") in message


def test_matrix_that_is_turned_against_its_tables(refused, path: Path) -> None:
    with h5py.File(path, "r+") as file:
        x = file["X"]
        dense = sp.csr_matrix((x["data"][:], x["indices"][:], x["indptr"][:]), shape=(60, 305)).toarray()
        del file["X"]
        file["X"] = dense.T
    assert "transpose the matrix" in refused(path)


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_missing_part_of_a_sparse_matrix(refused, path: Path, part: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[f"X/{part}"]
    assert part in refused(path)


def test_sparse_matrix_that_does_not_fit_together(refused, path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["X/indices"][7] = 999
    assert "outside of the matrix" in refused(path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][7] = 0
        file["X/indptr"][5] = 0
    assert "does not fit together" in refused(path)


def test_missing_zarr_chunk(refused, tiny_adata, tmp_path: Path) -> None:
    store = tmp_path / "cells.zarr"
    with pytest.warns(UserWarning, match="zarr"):
        tiny_adata().write_zarr(store)
    chunks = [file for file in (store / "X/data").rglob("*") if file.is_file() and not file.name.startswith(".")]
    chunks[0].unlink()
    assert "chunks of /X/data are missing" in refused(store)
    shutil.rmtree(store / "X/data")
    assert "are missing" in refused(store)


def test_missing_zarr_chunk_of_column_numbers(refused, tiny_adata, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zarr"):
        tiny_adata().write_zarr(tmp_path / "cells.zarr")
    chunk = next(file for file in (tmp_path / "cells.zarr/X/indices").rglob("*") if file.is_file() and not file.name.startswith("."))
    chunk.unlink()
    assert "chunks of /X/indices are missing" in refused(tmp_path / "cells.zarr")


@pytest.mark.parametrize(("shape", "said"), [((0, 5), "has no cells"), ((5, 0), "has no genes")])
def test_nothing_in_it(refused, shape: tuple[int, int], said: str) -> None:
    assert said in refused(ad.AnnData(sp.csr_matrix(shape, dtype=np.float32)))


@pytest.mark.parametrize(("bad", "said"), [(np.nan, "1 NaN"), (np.inf, "1 infinite"), (-2.0, "1 negative")])
@pytest.mark.parametrize("form", ["sparse", "dense", "disk"])
@pytest.mark.parametrize("n_sampled", [100, 50_000])
def test_bad_values(
    refused, tiny_adata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_sampled: int, bad: float, said: str, form: str
) -> None:
    monkeypatch.setattr("annformer.data.readers.SAMPLE_VALUES", n_sampled)  # met while reading, or at the first look
    adata = tiny_adata()
    x = adata.X.toarray()
    x[12, 7] = bad
    adata.X = x if form == "dense" else sp.csr_matrix(x)
    if form == "disk":
        adata.write_h5ad(tmp_path / "cells.h5ad")
    message = refused(tmp_path / "cells.h5ad" if form == "disk" else adata)
    assert f"has {said} values in cells 0 to 59" in message
    assert f"in cell 'cell12', gene {adata.var_names[7]!r}" in message


def test_transposed_cells(refused, tiny_adata) -> None:
    assert "seems to be transposed: 98% of the obs names are genes" in refused(tiny_adata().T)


def test_genes_under_another_key(refused, tiny_adata) -> None:
    adata = tiny_adata()
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"feature{i}" for i in range(adata.n_vars)]
    assert "symbol" in refused(adata)


def test_names_that_do_not_exist(refused, tiny_adata) -> None:
    adata = tiny_adata()
    adata.var["gene_symbol"] = adata.var_names
    adata.layers["Counts"] = adata.X
    assert "give gene_key='gene_symbol'" in refused(adata, gene_key="gene_symbols")
    assert "give layer='Counts'" in refused(adata, layer="counts")
    assert "give cell_type_key='cell_type'" in refused(adata, label_keys={"cell_type": "celltype"})
    assert "give column='cell_type'" in refused(adata, label_keys={"celltype": "celltype"}), "a column by itself has no key"
    del adata.obs["batch"]
    assert "correct batch_key" in refused(adata, label_keys={"batch": "batch"}), "the option of this name has"
    assert "one of: 'X'" in refused(tiny_adata(), layer="nothing like it")


def test_cells_without_label(refused, tiny_adata) -> None:
    adata = tiny_adata()
    adata.obs.loc[["cell4", "cell9"], "batch"] = np.nan
    said = refused(adata, label_keys={"batch": "batch"})
    assert "obs['batch'] has no value in 2 of 60 cells (the first: 'cell4')" in said
    for nothing in (np.full(60, np.nan, object), pd.Categorical([None] * 60), np.full(60, np.nan)):
        assert "no value in 60 of 60" in refused(
            ad.AnnData(adata.X, adata.obs.assign(batch=nothing), adata.var), label_keys={"batch": "batch"}
        )
    adata.obs["batch"] = adata.obs["batch"].cat.add_categories(["", " "])
    adata.obs.loc["cell4", "batch"], adata.obs.loc["cell9", "batch"] = "", " "
    assert refused(adata, label_keys={"batch": "batch"}) == said, "a blank is no name of a batch"
    assert AnnDataSource(adata).codes("label", "batch")[4] != AnnDataSource(adata).codes("label", "batch")[5], "a blank type is no type"


def test_a_broken_layer_does_not_hinder_the_description(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["layers/odd"] = np.ones((3, 3))
    with AnnDataSource(path) as source:
        kinds = {matrix["where"]: matrix["kind"] for matrix in source.describe()["matrices"]}
    assert kinds == {"X": "counts", "layers['odd']": "unreadable"}


def test_index_of_numbers(refused, tiny_adata) -> None:
    adata = tiny_adata()
    adata = ad.AnnData(adata.X, obs=adata.obs, var=pd.DataFrame(index=pd.Index(range(adata.n_vars)).astype(str)))
    assert "0%" in refused(adata) or "none" in refused(adata).lower() or "position" in refused(adata)


def test_scaled_values(refused, tiny_adata) -> None:
    adata = tiny_adata()
    adata.X = adata.X.toarray() - 0.3
    adata.layers["old"] = adata.X
    assert "values down to -0.3: centred or scaled" in (message := refused(adata))
    assert "['old'] with layer=" in message
