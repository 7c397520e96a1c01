"""What lies at a path, or in an AnnData object: the tables of cells and genes and the matrices, all of them unread."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from annformer.data.readers import CompressedRows, RowReader, compressed, reader_of, reading
from annformer.data.tables import FrameTable, Table, table_of
from annformer.errors import AnnformerWarning, InputError, input_error

GENES = ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv")
BARCODES = ("barcodes.tsv.gz", "barcodes.tsv")
ACCEPTED = "an .h5ad file, a .zarr folder, a 10x .h5 file, or a 10x folder with matrix.mtx(.gz)"


@dataclass(frozen=True)
class Matrix:
    """One of the matrices of a container; not yet opened."""

    open: Callable[[], RowReader]
    var: Table


@dataclass(frozen=True)
class Container:
    """Cells as they are kept somewhere."""

    format: str
    name: str
    """For messages: the path, or what kind of object it is."""
    obs: Table
    var: Table
    matrices: dict[str, Matrix]
    """By place: "X", "layers['counts']", ".raw.X"."""
    on_disk: bool = True
    close: Callable[[], None] = field(default=lambda: None)

    def reading(self, what: str = "") -> AbstractContextManager[None]:
        """Guard for reading a part of it: what goes wrong on disk is the file's fault, in memory it is ours."""
        return reading(f"{what} of {self.name}" if what else self.name) if self.on_disk else nullcontext()


def open_container(data: anndata.AnnData | str | Path | Container) -> Container:
    """Look at what `data` is; read nothing yet but, for mtx folders, everything."""
    if isinstance(data, Container):
        return data
    if isinstance(data, anndata.AnnData):
        return _of_anndata(data)
    if not isinstance(data, str | Path):
        found = f"data of type {type(data).__name__}"
        raise input_error(found, f"an AnnData object, {ACCEPTED}", "pass one of those")
    path = Path(data).expanduser()
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        return _of_folder(path)
    if path.name.endswith((".mtx", ".mtx.gz")):
        return _of_mtx(path, *_tables_beside(path))
    return _of_hdf5(path)


def _missing(path: Path) -> InputError:
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    remedy = f"did you mean {' or '.join(str(path.parent / name) for name in near)}" if near else "check the path"
    return input_error(f"{path} does not exist", ACCEPTED, remedy)


def _of_anndata(adata: anndata.AnnData) -> Container:
    obs, var = FrameTable(adata.obs), FrameTable(adata.var)
    matrices = {}
    if adata.X is not None:
        matrices["X"] = Matrix(lambda: reader_of(adata.X), var)
    for name in adata.layers:
        matrices[f"layers[{name!r}]"] = Matrix(lambda name=name: reader_of(adata.layers[name]), var)  # type: ignore[misc]
    raw = adata.raw
    if raw is not None:
        matrices[".raw.X"] = Matrix(lambda: reader_of(raw.X), FrameTable(raw.var))
    kind = "backed AnnData" if adata.isbacked else "AnnData"
    if adata.isbacked and adata.is_view:
        msg = "the cells of a view of a backed AnnData are read into memory whole; to save memory, save them as a file of their own"
        warnings.warn(msg, AnnformerWarning, stacklevel=4)
    return Container(f"{kind} (view)" if adata.is_view else kind, "the AnnData object", obs, var, matrices, on_disk=adata.isbacked)


def _of_nodes(root: Any, form: str, path: Path) -> Container:
    """Container of an opened h5ad or zarr file."""
    missing = [name for name in ("obs", "var") if name not in root]
    if missing:
        holds = ", ".join(sorted(root.keys())) or "nothing"
        found = f"{path} has no {' and no '.join(missing)} (it holds {holds})"
        raise input_error(found, ACCEPTED, "write the file with AnnData's write_h5ad")
    uns = root.get("uns")
    obs, var = table_of(root["obs"], uns), table_of(root["var"], uns)
    matrices = {}
    if "X" in root:
        matrices["X"] = Matrix(lambda: reader_of(root["X"]), var)
    for name in root.get("layers", ()):
        matrices[f"layers[{name!r}]"] = Matrix(lambda name=name: reader_of(root["layers"][name]), var)  # type: ignore[misc]
    for x, raw_var in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
        if x in root and raw_var in root:
            matrices[".raw.X"] = Matrix(lambda x=x: reader_of(root[x]), table_of(root[raw_var], uns))  # type: ignore[misc]
    close = root.close if isinstance(root, h5py.File) else lambda: None
    return Container(form, str(path), obs, var, matrices, close=close)


def _of_folder(path: Path) -> Container:
    if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")):
        with reading(str(path)):
            return _of_nodes(zarr.open_group(path, mode="r"), "zarr", path)
    if any(path.glob("*matrix.mtx*")):
        return _of_mtx(
            _one_of(path, "*matrix.mtx.gz", "*matrix.mtx"),
            _one_of(path, *(f"*{name}" for name in GENES)),
            _one_of(path, *(f"*{name}" for name in BARCODES)),
        )
    found = f"{path} is a folder without a zarr store or a matrix.mtx in it"
    raise input_error(found, ACCEPTED, "give the file or folder that holds the cells")


def _of_hdf5(path: Path) -> Container:
    if not h5py.is_hdf5(path):
        raise _not_hdf5(path)
    with reading(str(path)):
        root = h5py.File(path, "r")
        if "matrix" in root and "barcodes" in root["matrix"]:
            return _of_tenx(root, root["matrix"], path)
        genomes = [name for name, node in root.items() if isinstance(node, h5py.Group) and {"barcodes", "gene_names"} <= set(node)]
        if len(genomes) > 1:
            found = f"{path} holds several genomes: {', '.join(genomes)}"
            raise input_error(found, "cells of one genome", "take one with scanpy.read_10x_h5(path, genome=...) and save it as h5ad")
        if genomes:
            return _of_tenx(root, root[genomes[0]], path)
        if "mod" in root:
            found = f"{path} is a MuData file"
            raise input_error(found, ACCEPTED, "save one modality: mudata.read(path).mod['rna'].write_h5ad(...)")
        return _of_nodes(root, "h5ad", path)


def _not_hdf5(path: Path) -> InputError:
    with reading(str(path)), path.open("rb") as file:
        head = file.read(8)
    kinds = {b"\x1f\x8b": "compressed with gzip; unpack it first (gunzip)", b"PK": "a zip archive; unpack it first", b"": "empty"}
    known = next((text for magic, text in kinds.items() if magic and head.startswith(magic)), "" if head else kinds[b""])
    remedy = "give one of those; other formats can be read with scanpy and saved with write_h5ad"
    return input_error(f"{path} is not an HDF5 file" + (f": it is {known}" if known else ""), ACCEPTED, remedy)


def _of_tenx(root: h5py.File, group: h5py.Group, path: Path) -> Container:
    """10x keeps genes x cells by columns, which is cells x genes by rows."""
    n_genes, n_cells = (int(n) for n in group["shape"][:])
    features = group.get("features", group)
    columns = {"gene_ids": ("id", "genes"), "gene_names": ("name", "gene_names"), "feature_types": ("feature_type",), "genome": ("genome",)}
    frame = {
        to: _strings(features[name]) for to, names in columns.items() for name in names if isinstance(features.get(name), h5py.Dataset)
    }
    names = frame.pop("gene_names")
    var = FrameTable(pd.DataFrame(frame, index=names))
    obs = FrameTable(pd.DataFrame(index=_strings(group["barcodes"])))
    form = "10x h5 (v3)" if "features" in group else "10x h5 (v2)"
    matrix = Matrix(lambda: compressed(group, (n_cells, n_genes), by_columns=False), var)
    return Container(form, str(path), obs, var, {"X": matrix}, close=root.close)


def _strings(dataset: h5py.Dataset) -> np.ndarray:
    return dataset.asstr()[:] if dataset.dtype.kind == "O" else np.char.decode(dataset[:], "utf-8").astype(object)


def _tables_beside(matrix_file: Path) -> list[Path]:
    """Find genes and barcodes of an mtx file: they are named as it is but for the last word."""
    prefix, found, _ = matrix_file.name.rpartition("matrix.mtx")
    if not found:
        expected = "a name that ends in matrix.mtx or matrix.mtx.gz, as 10x gives it, which says how its genes and barcodes are named"
        msg = f"{matrix_file} has another name"
        raise input_error(msg, expected, "rename the three files: matrix.mtx, features.tsv, barcodes.tsv")
    tables = []
    for names in (GENES, BARCODES):
        beside = [file for name in names if (file := matrix_file.with_name(prefix + name)).exists()]
        if not beside:
            wanted = " or ".join(prefix + name for name in names)
            msg = f"beside {matrix_file} there is no {wanted}"
            raise input_error(msg, "genes and barcodes of this matrix", "add the missing file")
        tables.append(beside[0])
    return tables


def _of_mtx(matrix_file: Path, genes_file: Path, cells_file: Path) -> Container:
    with reading(f"{matrix_file} with its tables"):
        from scipy.io import mmread

        genes = pd.read_csv(genes_file, sep="\t", header=None, dtype=str, keep_default_na=False)
        cells = pd.read_csv(cells_file, sep="\t", header=None, dtype=str, keep_default_na=False)
        matrix = sp.coo_array(mmread(matrix_file))
    shape = (len(genes), len(cells))
    if matrix.shape not in (shape, shape[::-1]):
        found = f"{matrix_file} has shape {matrix.shape}, {genes_file.name} {len(genes)} lines, {cells_file.name} {len(cells)} lines"
        raise input_error(found, "genes x barcodes", "take the three files from the same run")
    rows = (matrix.T if matrix.shape == shape else matrix).tocsr()
    names = genes[1 if genes.shape[1] > 1 else 0].to_numpy()
    columns = {to: genes[at] for at, to in ((0, "gene_ids"), (2, "feature_types")) if at < genes.shape[1]}
    var = FrameTable(pd.DataFrame(columns).set_axis(names, axis=0))
    obs = FrameTable(pd.DataFrame(index=cells[0].to_numpy()))
    reader = CompressedRows(rows.data, rows.indices, rows.indptr, rows.shape)
    return Container("10x mtx folder", str(matrix_file), obs, var, {"X": Matrix(lambda: reader, var)}, on_disk=False)


def _one_of(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            found = f"{folder} holds {len(files)} files {pattern}"
            raise input_error(
                found, "one data set in a folder", "give the path of one matrix file, or put each data set into a folder of its own"
            )
        if files:
            return files[0]
    found = f"{folder} has no {' or '.join(patterns)}"
    raise input_error(found, "matrix, features (or genes) and barcodes of 10x", "complete the folder")
