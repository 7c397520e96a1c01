"""Row readers: contiguous rows of a matrix, whatever holds it (memory, HDF5, zarr; by rows, by columns, dense)."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import h5py
import numpy as np
import scipy.sparse as sp
import zarr
from jaxtyping import Int

from annformer.data.collapse import Rows
from annformer.data.transpose import write_rows
from annformer.errors import InputError, input_error

logger = logging.getLogger(__name__)

BLOCK_VALUES = 2**19
"""Values read at a time: small enough to stay in the processor's cache and to keep memory flat, large enough to be fast."""
MAX_BLOCK_VALUES = 2**24
"""Upper bound where the chunks of a store are so large that smaller blocks would unpack each chunk several times."""
SAMPLE_VALUES = 50_000


class RowReader(Protocol):
    """A matrix of which rows can be read."""

    shape: tuple[int, int]
    stored: str
    """How it is stored: "by rows", "by columns" or "dense"."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        ...

    @property
    def n_values(self) -> int:
        """Values that are stored: for a dense matrix all of them."""
        ...

    @property
    def rows_at_once(self) -> int:
        """Rows that are best read together."""
        ...

    def read(self, start: int, stop: int) -> Rows:
        """Read rows `start` to `stop`."""
        ...

    def sample(self) -> np.ndarray:
        """Some values from the beginning, the middle and the end, to see what kind of data they are."""
        ...


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what h5py and zarr say about a broken file into one clear message."""
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, IndexError, RuntimeError, ValueError, zlib.error) as error:
        found = f"{name} cannot be read; it seems damaged or incomplete ({type(error).__name__}: {error})"
        raise input_error(found, "a complete file", "copy, download or write the file again") from error


def read_rows(reader: RowReader, rows: Int[np.ndarray, "row"]) -> Rows:
    """Read the given rows, in their order, as few contiguous runs as possible."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    parts = [reader.read(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(indptr, np.concatenate([part.indices for part in parts]), np.concatenate([part.data for part in parts]))


def reader_of(matrix: object) -> RowReader:
    """Choose the reader for a matrix: array, sparse matrix, HDF5 or zarr node, AnnData's backed matrices."""
    group = getattr(matrix, "group", None)  # AnnData's backed sparse matrices
    if isinstance(group, h5py.Group | zarr.Group):
        matrix = group
    if sp.issparse(matrix):
        return _of_sparse(matrix)
    if isinstance(matrix, np.ndarray):
        return DenseRows(np.asarray(matrix))
    if isinstance(matrix, h5py.Dataset | zarr.Array):
        return DenseRows(matrix)
    if isinstance(matrix, h5py.Group | zarr.Group):
        return _of_group(matrix)
    found = f"the matrix is a {type(matrix).__module__}.{type(matrix).__name__}"
    raise input_error(
        found,
        "a NumPy array, a SciPy sparse matrix, or one on disk",
        "convert it, for example with adata.X = scipy.sparse.csr_matrix(adata.X)",
    )


def _of_sparse(matrix: Any) -> RowReader:
    if matrix.format == "csc":
        return ColumnsReader(matrix.data, matrix.shape, matrix.tocsr)
    rows = matrix.tocsr()
    return CompressedRows(rows.data, rows.indices, rows.indptr, rows.shape)


def _of_group(group: h5py.Group | zarr.Group) -> RowReader:
    encoding = str(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    shape: Any = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    missing = [name for name in ("data", "indices", "indptr") if name not in group]
    if missing or shape is None or not encoding.startswith(("csr", "csc")):
        found = f"{group.name} in the file is not a matrix that can be read (encoding {encoding!r}, missing {missing or 'shape'})"
        raise input_error(
            found,
            "a dense, CSR or CSC matrix as AnnData writes it",
            "write the file again with AnnData",
        )
    n_rows, n_columns = (int(n) for n in shape)
    return compressed(group, (n_rows, n_columns), by_columns=encoding.startswith("csc"))


def compressed(group: h5py.Group | zarr.Group, shape: tuple[int, int], *, by_columns: bool) -> RowReader:
    """Reader of a group with `data`, `indices`, `indptr`."""
    data, indices, indptr = group["data"], group["indices"], group["indptr"]
    _require_chunks(data, indices, indptr)
    if by_columns:
        columns = CompressedRows(data, indices, indptr, shape[::-1])
        return ColumnsReader(data, shape, lambda: _rows_of_columns(columns))
    return CompressedRows(data, indices, indptr, shape)


def _require_chunks(data: object, indices: object, indptr: Any) -> None:
    # zarr reads a missing chunk as zeros, be it that the writer left out its zeros or that it was never copied
    for array in (data, indices):
        if not isinstance(array, zarr.Array) or array.nchunks_initialized == array.nchunks:
            continue
        n_missing = array.nchunks - array.nchunks_initialized
        if array is data or not _may_lack(array, n_missing, np.asarray(indptr[:])):  # a sparse matrix stores no zeros
            found = f"{n_missing} of the {array.nchunks} chunks of {array.name} are missing"
            raise input_error(found, "a complete zarr store", "copy or download the store again")


def _may_lack(indices: zarr.Array, n_missing: int, indptr: np.ndarray) -> bool:
    """Whether chunks of zeros are missing where zeros can be: column 0 stands at most once in a row, at its beginning."""
    size, n_zeros = indices.chunks[0], 0
    for first in range(0, indices.shape[0], size):
        chunk = np.asarray(indices[first : first + size])
        if chunk.any():
            continue
        begins = np.unique(indptr[(indptr >= first) & (indptr < first + len(chunk))])
        if len(begins) < len(chunk):
            return False
        n_zeros += 1
    return n_zeros >= n_missing


class _Sparse:
    """What the stored values of a sparse matrix tell, whichever way they are ordered."""

    def __init__(self, data: Any, shape: tuple[int, int]) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self._data = data

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return np.dtype(self._data.dtype)

    @property
    def n_values(self) -> int:
        """Values that are stored."""
        return int(self._data.shape[0])

    @property
    def rows_at_once(self) -> int:
        """Rows that are best read together."""
        return _rows_at_once(self._data, self.n_values / self.shape[0])

    def sample(self) -> np.ndarray:
        """Some stored values."""
        return _sample(self._data, SAMPLE_VALUES)


class CompressedRows(_Sparse):
    """CSR in memory or on disk."""

    stored = "by rows"

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        super().__init__(data, shape)
        self._indices, self._stored_indptr = indices, indptr
        if not (indptr.shape[0] == self.shape[0] + 1 and data.shape == indices.shape):
            lengths = f"indptr has {indptr.shape[0]} entries for {self.shape[0]} rows, data {data.shape[0]}, indices {indices.shape[0]}"
            found = f"a sparse matrix does not fit together: {lengths}"
            raise input_error(found, "rows + 1, and data as long as indices", "write the file again")

    @cached_property
    def indptr(self) -> Int[np.ndarray, "row+1"]:
        """Where each row begins; the only part that is held whole."""
        indptr = np.asarray(self._stored_indptr[:], dtype=np.int64)
        if indptr[0] != 0 or indptr[-1] != self.n_values or (np.diff(indptr) < 0).any():
            found = (
                f"a sparse matrix does not fit together: its row pointer goes from {indptr[0]} to {indptr[-1]} over {self.n_values} values"
            )
            raise input_error(found, "a pointer that grows from 0 to the number of values", "write the file again")
        return indptr

    def read(self, start: int, stop: int) -> Rows:
        """Read rows `start` to `stop`."""
        indptr = self.indptr[start : stop + 1]
        first, last = int(indptr[0]), int(indptr[-1])
        return Rows(indptr - first, self._indices[first:last], self._data[first:last])


class DenseRows:
    """A dense matrix in memory or on disk; zeros are left out while reading."""

    stored = "dense"

    def __init__(self, array: Any) -> None:
        if len(array.shape) != 2:
            found = f"the matrix has {len(array.shape)} dimensions"
            raise input_error(found, "cells x genes", "write the file again with AnnData")
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        self._array = array

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return np.dtype(self._array.dtype)

    @property
    def n_values(self) -> int:
        """All values."""
        return self.shape[0] * self.shape[1]

    @property
    def rows_at_once(self) -> int:
        """Rows that are best read together."""
        return _rows_at_once(self._array, self.shape[1])

    def read(self, start: int, stop: int) -> Rows:
        """Read rows `start` to `stop`."""
        block = np.asarray(self._array[start:stop])
        row, column = np.nonzero(block)  # NaN counts as non-zero, so it is met by the check of the values
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=stop - start))])
        return Rows(indptr, column, block[row, column])

    def sample(self) -> np.ndarray:
        """Some values."""
        return _sample(self._array, max(1, SAMPLE_VALUES // max(1, self.shape[1])))


class ColumnsReader(_Sparse):
    """CSC: turned into rows once, when the first row is asked for."""

    stored = "by columns"

    def __init__(self, data: Any, shape: tuple[int, int], convert: Callable[[], Any]) -> None:
        super().__init__(data, shape)
        self._convert = convert

    @cached_property
    def _rows(self) -> CompressedRows:
        logger.info("the matrix is stored by genes: making a temporary copy by cells")
        rows = self._convert()
        return rows if isinstance(rows, CompressedRows) else CompressedRows(rows.data, rows.indices, rows.indptr, rows.shape)

    def read(self, start: int, stop: int) -> Rows:
        """Read rows `start` to `stop`."""
        return self._rows.read(start, stop)


def _rows_of_columns(columns: CompressedRows) -> CompressedRows:
    copy = write_rows(columns)
    return CompressedRows(copy.data, copy.indices, copy.indptr, columns.shape[::-1])


def _rows_at_once(array: Any, per_row: float) -> int:
    chunks = getattr(array, "chunks", None)  # of compressed stores: a block spans several chunks, so that each is unpacked about once
    whole_chunks = 2 * chunks[0] * int(np.prod(array.shape[1:])) if chunks else 0
    wanted = max(BLOCK_VALUES, whole_chunks)
    return max(1, int(min(wanted, MAX_BLOCK_VALUES) / max(1.0, per_row)))


def _sample(array: Any, n: int) -> np.ndarray:
    length = array.shape[0]
    starts = {0} if length <= 3 * n else {0, length // 2, length - n}
    size = 3 * n if length <= 3 * n else n
    return np.concatenate([np.asarray(array[start : start + size]).ravel() for start in sorted(starts)])
