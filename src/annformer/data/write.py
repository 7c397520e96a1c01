"""A copy of an AnnData file with one embedding more, in bounded memory.

Same format and all cells: the file is copied as it is and the embedding added. Otherwise element by element: matrices as streams of blocks,
everything else through anndata.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem, write_elem
from jaxtyping import Bool, Float, Int

from annformer.data.formats import Container
from annformer.data.tables import Table
from annformer.errors import InputError, input_error

Node: TypeAlias = Any
"""A group or an array of h5py or zarr; what is used here, both spell alike."""
Content = Literal["all", "embedding"]

_BLOCK = 1 << 22
"""Entries of a matrix handled at a time."""
_PAGE = 4_096
_LARGE = 1 << 18
"""Bytes in one piece that can only be data, of which HDF5 needs nothing to go on."""


@dataclass(frozen=True)
class Addition:
    """What the copy has more than the original."""

    key: str
    """Its name in `obsm`."""
    shape: tuple[int, int]
    blocks: Callable[[], Iterator[Float[np.ndarray, "cell width"]]]
    """Gives the rows from the top, block by block."""
    record: Mapping[str, Any]
    """Goes to `uns["annformer"][key]`; plain values that HDF5 can hold."""


def require_place(source: Container, path_in: Path) -> None:
    """Refuse an input in which something else has the place of the record, before any work."""
    if source.format not in ("h5ad", "zarr"):
        return
    with opened(path_in, "r") as root:
        taken = "uns" in root and "annformer" in root["uns"] and not _is_mapping(root["uns"]["annformer"])
    if taken:
        raise foreign_record(str(path_in))


def _is_mapping(node: Node) -> bool:
    return hasattr(node, "keys") and node.attrs.get("encoding-type", "dict") == "dict"


def foreign_record(where: str) -> InputError:
    """For an `uns["annformer"]` that is not ours."""
    found = f'uns["annformer"] of {where} is not a mapping, so it was not written by annformer'
    return input_error(found, "that name free for the record of the embedding", 'rename or delete uns["annformer"]')


def write_copy(
    source: Container,
    path_in: Path,
    path_out: Path,
    addition: Addition | None,
    *,
    keep: Bool[np.ndarray, "cell"] | None = None,
    content: Content = "all",
) -> None:
    """Write the cells of `source`, with `addition` if there is one, to `path_out`, which must not exist.

    Parameters
    ----------
    source
        What was read from `path_in`.
    path_in
        h5ad, zarr, 10x `.h5` or mtx folder. An h5ad from before AnnData 0.8 is read whole.
    path_out
        A folder when it ends in `.zarr`, else h5ad.
    keep
        Cells to keep; all by default.
    content
        "embedding" keeps only `obs` beside the addition.
    """
    encoded = source.format in ("h5ad", "zarr") and _is_encoded(path_in)
    same_format = encoded and source.format == ("zarr" if path_out.suffix == ".zarr" else "h5ad")
    if same_format and keep is None and content == "all":
        _copy_as_it_is(path_in, path_out)
    elif source.format == "h5ad" and not encoded:
        _write_whole(path_in, path_out, keep, content)
    else:
        with opened(path_out, "w") as target:
            target.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            if content == "embedding" or not encoded:
                _write_tables(source, target, keep, content)
            else:
                with opened(path_in, "r") as root:
                    _write_elements(root, target, keep)
    if addition is not None:
        with opened(path_out, "r+") as target:
            _add(target, addition, keep)
    settle(path_out)


def settle(path_out: Path) -> None:
    """Make a written file safe on the disk, and the list of its parts in a zarr store complete."""
    if path_out.is_dir():
        zarr.consolidate_metadata(str(path_out))
    else:
        with path_out.open("rb") as file:
            os.fsync(file.fileno())


def _is_encoded(path: Path) -> bool:
    """Whether the elements say how they are encoded, as AnnData writes since 0.8."""
    with opened(path, "r") as root:
        return bool(root.attrs.get("encoding-type") == "anndata")


@contextmanager
def opened(path: Path, mode: Literal["r", "r+", "w"]) -> Iterator[Node]:
    """Root of an h5ad file or a zarr store."""
    if path.suffix == ".zarr" or path.is_dir():
        new = {"zarr_format": anndata.settings.zarr_write_format} if mode == "w" else {}
        yield zarr.open_group(str(path), mode=mode, use_consolidated=False, **new)
    elif mode == "r":
        with h5py.File(path, "r") as file:
            yield file
    else:
        with _FullDiskGuard(path, "w+" if mode == "w" else "r+") as guard, h5py.File(guard, mode) as file:
            yield file


class _FullDiskGuard(io.FileIO):
    """A file that keeps the system's refusal to write to itself until it is closed.

    HDF5 crashes the process when it cannot write what it still holds, or does not find again what it wrote; so it is let believe that
    all is well, and its user is told afterwards. From the refusal on, what HDF5 writes about its own structure (in small pieces) is kept
    in memory; of the data, zeros are read.
    """

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._refusal: OSError | None = None
        self._kept: dict[int, bytearray] = {}
        """Pages of the file as they would be, by number."""

    def write(self, data: Any) -> int:
        """Write all of `data`, or take note that it cannot be written."""
        content, written, start = memoryview(data).cast("B"), 0, self.tell()
        try:
            while written < len(content) and self._refusal is None:
                written += super().write(content[written:])
        except OSError as error:
            self._refusal = error
        if written < len(content):
            if len(content) < _LARGE:
                self._keep(start, content)
            self.seek(start + len(content))
        return len(content)

    def readinto(self, buffer: Any) -> int:
        """Fill all of `buffer`, beyond the end of the file with zeros: h5py would take what is left unfilled for content."""
        content, start = memoryview(buffer).cast("B"), self.tell()
        found = 0
        while found < len(content) and (n_bytes := super().readinto(content[found:])):
            found += n_bytes
        content[found:] = bytes(len(content) - found)
        for page, at, first, last in _pages(start, len(content)) if self._kept else ():
            if page in self._kept:
                content[first:last] = self._kept[page][at : at + last - first]
        self.seek(start + len(content))
        return len(content)

    def _keep(self, start: int, content: memoryview) -> None:
        for page, at, first, last in _pages(start, len(content)):
            if page not in self._kept:
                whole = bytearray(_PAGE)
                self.seek(page * _PAGE)
                self.readinto(whole)
                self._kept[page] = whole
            self._kept[page][at : at + last - first] = content[first:last]

    def truncate(self, size: int | None = None) -> int:
        """Cut or lengthen the file, or take note that it cannot be lengthened."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._refusal = self._refusal or error
        return size or 0

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._refusal is not None:
            raise self._refusal


def _pages(start: int, n_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Pages that `n_bytes` from `start` touch: number, place in the page, and from where to where in the bytes."""
    for page in range(start // _PAGE, -(-(start + n_bytes) // _PAGE)):
        first, last = max(0, page * _PAGE - start), min(n_bytes, (page + 1) * _PAGE - start)
        yield page, start + first - page * _PAGE, first, last


def _copy_as_it_is(path_in: Path, path_out: Path) -> None:
    """Contents only: permissions of the original, which may forbid writing, stay behind."""
    if path_in.is_file():
        shutil.copyfile(path_in, path_out)
        return
    for folder, _, names in os.walk(path_in):
        target = path_out / Path(folder).relative_to(path_in)
        target.mkdir()
        for name in names:
            shutil.copyfile(Path(folder, name), target / name)


def _write_whole(path_in: Path, path_out: Path, keep: Bool[np.ndarray, "cell"] | None, content: Content) -> None:
    """Through memory, for the encodings of old."""
    data = anndata.read_h5ad(path_in)
    data = data if keep is None else data[keep].copy()
    data = data if content == "all" else anndata.AnnData(obs=data.obs)
    with opened(path_out, "w") as target:
        write_elem(target, "/", data)


def _write_tables(source: Container, target: Node, keep: Bool[np.ndarray, "cell"] | None, content: Content) -> None:
    """From what the source knows: the table of cells and, unless only the embedding is wanted, that of genes and X."""
    obs = _frame(source.obs)
    write_elem(target, "obs", obs if keep is None else obs.loc[keep])
    if content == "embedding":
        write_elem(target, "var", pd.DataFrame(index=pd.Index([], dtype=str)))
        return
    write_elem(target, "var", _frame(source.var))
    reader = source.matrices["X"].open()
    keep = np.ones(reader.shape[0], dtype=bool) if keep is None else keep
    shape = (int(keep.sum()), reader.shape[1])
    matrix = _SparseWriter(target, "X", "csr_matrix", shape, reader.n_values, reader.dtype, np.dtype(np.int32), compressed=True)
    for first in range(0, len(keep), reader.rows_at_once):
        rows = reader.read(first, min(first + reader.rows_at_once, len(keep)))
        kept, lengths = keep[first : first + reader.rows_at_once], np.diff(rows.indptr)
        inside = np.repeat(kept, lengths)
        matrix.append(rows.data[inside], rows.indices[inside], lengths[kept])
    matrix.finish()


def _frame(table: Table) -> pd.DataFrame:
    return pd.DataFrame({name: table.column(name).array for name in table.columns}, index=pd.Index(table.names))


def _write_elements(source: Node, target: Node, keep: Bool[np.ndarray, "cell"] | None) -> None:
    for name in source:
        if name == "X":
            _copy_matrix(source[name], target, name, keep)
        elif name in ("layers", "raw") and hasattr(source[name], "keys"):
            _copy_group(source[name], target, name, keep)
        else:
            write_elem(target, name, _kept(name, read_elem(source[name]), keep))


def _copy_group(source: Node, parent: Node, name: str, keep: Bool[np.ndarray, "cell"] | None) -> None:
    """`layers` or `raw`: the matrices with cells as rows by stream."""
    group = parent.create_group(name)
    group.attrs.update(dict(source.attrs))
    for member in source:
        if name == "layers" or member == "X":
            _copy_matrix(source[member], group, member, keep)
        else:
            write_elem(group, member, read_elem(source[member]))


def _kept(name: str, value: Any, keep: Bool[np.ndarray, "cell"] | None) -> Any:
    """The part of an element that belongs to the cells kept."""
    if keep is None or name not in ("obs", "obsm", "obsp"):
        return value
    if name == "obs":
        return value.loc[keep]
    chosen = {key: rows.loc[keep] if isinstance(rows, pd.DataFrame) else rows[keep] for key, rows in value.items()}
    return chosen if name == "obsm" else {key: rows[:, keep] for key, rows in chosen.items()}


def _copy_matrix(source: Node, parent: Node, name: str, keep: Bool[np.ndarray, "cell"] | None) -> None:
    kind = source.attrs.get("encoding-type")
    if kind in ("csr_matrix", "csc_matrix"):
        _copy_sparse(source, parent, name, np.ones(int(source.attrs["shape"][0]), dtype=bool) if keep is None else keep)
    elif kind == "array" and len(source.shape) == 2:
        _copy_dense(source, parent, name, np.ones(source.shape[0], dtype=bool) if keep is None else keep)
    else:  # e.g. a data frame as a layer
        value = read_elem(source)
        write_elem(parent, name, value if keep is None else value[keep])


def _copy_dense(source: Node, parent: Node, name: str, keep: Bool[np.ndarray, "cell"]) -> None:
    target = _new_array(parent, name, (int(keep.sum()), source.shape[1]), source.dtype, compressed=_compressed(source))
    target.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    size, written = max(1, _BLOCK // max(1, source.shape[1])), 0
    for first in range(0, len(keep), size):
        rows = source[first : first + size][keep[first : first + size]]
        target[written : written + len(rows)] = rows
        written += len(rows)


def _copy_sparse(source: Node, parent: Node, name: str, keep: Bool[np.ndarray, "cell"]) -> None:
    """CSR or CSC; the entries of cells not kept are left out on the way."""
    kind, (n_rows, n_columns) = source.attrs["encoding-type"], (int(n) for n in source.attrs["shape"])
    by_rows, position = kind == "csr_matrix", np.cumsum(keep) - 1
    assert len(keep) == n_rows, "one flag for every row"
    indptr, data, indices = source["indptr"][:], source["data"], source["indices"]
    matrix = _SparseWriter(
        parent, name, kind, (int(keep.sum()), n_columns), int(indptr[-1]), data.dtype, indices.dtype, compressed=_compressed(data)
    )
    for first, last in _runs(indptr):
        begin, end = int(indptr[first]), int(indptr[last])
        minor = indices[begin:end]
        inside = np.repeat(keep[first:last], np.diff(indptr[first : last + 1])) if by_rows else keep[minor]
        lengths = np.diff(np.concatenate([[0], np.cumsum(inside)])[indptr[first : last + 1] - begin])
        matrix.append(
            data[begin:end][inside], (minor if by_rows else position[minor])[inside], lengths[keep[first:last]] if by_rows else lengths
        )
    matrix.finish()


class _SparseWriter:
    """A sparse matrix that is written from its first row (CSC: column) to its last."""

    def __init__(
        self, parent: Node, name: str, kind: str, shape: tuple[int, int], most: int, dtype: Any, index_dtype: Any, *, compressed: bool
    ) -> None:
        self._group = parent.create_group(name)
        self._group.attrs.update({"encoding-type": kind, "encoding-version": "0.1.0", "shape": list(shape)})
        self._data = _new_array(self._group, "data", (most,), dtype, compressed=compressed)
        self._indices = _new_array(self._group, "indices", (most,), index_dtype, compressed=compressed)
        self._lengths: list[np.ndarray] = []
        self._written = 0

    def append(self, data: np.ndarray, indices: Int[np.ndarray, "entry"], lengths: Int[np.ndarray, "row"]) -> None:
        """Add rows with `lengths` entries."""
        place = slice(self._written, self._written + len(data))
        self._data[place], self._indices[place] = data, indices
        self._written += len(data)
        self._lengths.append(lengths)

    def finish(self) -> None:
        """Cut the arrays to what was written and add the row pointer."""
        for array in (self._data, self._indices):
            array.resize((self._written,))
        write_elem(self._group, "indptr", np.concatenate([[0], *self._lengths]).cumsum(dtype=np.int64))


def _runs(indptr: Int[np.ndarray, "row+1"]) -> Iterator[tuple[int, int]]:
    """Cut the rows (of a CSC: columns) into runs of about `_BLOCK` entries."""
    first, n_rows = 0, len(indptr) - 1
    while first < n_rows:
        last = int(np.searchsorted(indptr, indptr[first] + _BLOCK, side="right")) - 1
        last = min(max(last, first + 1), n_rows)
        yield first, last
        first = last


def _compressed(array: Node) -> bool:
    return not isinstance(array, h5py.Dataset) or array.compression is not None


def _new_array(parent: Node, name: str, shape: tuple[int, ...], dtype: Any, *, compressed: bool) -> Node:
    """An empty array that can be cut short later; zarr compresses by its own default."""
    per_row = int(np.prod(shape[1:]))
    chunks = (max(1, min(max(shape[0], 1), (1 << 18) // max(per_row, 1))), *(max(1, n) for n in shape[1:]))
    if isinstance(parent, zarr.Group):
        return parent.create_array(name, shape=shape, dtype=dtype, chunks=chunks)
    return parent.create_dataset(
        name, shape=shape, dtype=dtype, chunks=chunks, maxshape=(None, *shape[1:]), compression="gzip" if compressed else None
    )


def _add(target: Node, addition: Addition, keep: Bool[np.ndarray, "cell"] | None) -> None:
    """Write the embedding and its record into an AnnData file, in place of what has that name."""
    obsm, records = (group_at(target, *path) for path in (("obsm",), ("uns", "annformer")))
    for group in (obsm, records):
        if addition.key in group:
            del group[addition.key]
    n_rows = addition.shape[0] if keep is None else int(keep.sum())
    array = _new_array(obsm, addition.key, (n_rows, addition.shape[1]), np.float32, compressed=False)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    read = written = 0
    for block in addition.blocks():
        rows = block if keep is None else block[keep[read : read + len(block)]]
        array[written : written + len(rows)] = rows
        read, written = read + len(block), written + len(rows)
    write_elem(records, addition.key, dict(addition.record))


def group_at(parent: Node, *names: str) -> Node:
    """The mapping at this path, made where there is none."""
    for name in names:
        if name not in parent:
            write_elem(parent, name, {})
        parent = parent[name]
    return parent
