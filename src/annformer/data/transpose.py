"""A matrix stored by columns on disk -> a temporary one by rows, in bounded memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from annformer.data.collapse import Rows
from annformer.errors import input_error
from annformer.kernels import jit

if TYPE_CHECKING:
    from annformer.data.readers import RowReader


def write_rows(columns: RowReader) -> Rows:
    """Write what `columns` reads (the transposed matrix) by rows into temporary files.

    Two passes: count the values of each row, then put every value in its place.

    Returns
    -------
    The rows, memory-mapped. The files lie in the system's temporary folder (TMPDIR) without a name and go with the arrays.
    """
    n_rows = columns.shape[1]
    lengths = np.zeros(n_rows, dtype=np.int64)
    for _, part in _blocks(columns):
        lengths += np.bincount(part.indices, minlength=n_rows)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    data, indices = _scratch(columns.n_values, columns.dtype)
    cursor = indptr[:-1].copy()
    for first, part in _blocks(columns):
        _scatter(part.indptr, part.indices.astype(np.int64), part.data, first, cursor, indices, data)
    return Rows(indptr, indices, data)


def _blocks(columns: RowReader) -> Iterator[tuple[int, Rows]]:
    step = columns.rows_at_once
    for first in range(0, columns.shape[0], step):
        part = columns.read(first, min(first + step, columns.shape[0]))
        if len(part.indices) and not 0 <= int(part.indices.min()) <= int(part.indices.max()) < columns.shape[1]:
            msg = "a stored row number lies outside of the matrix"
            raise IndexError(msg)
        yield first, part


def _scratch(n_values: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    needed = n_values * (dtype.itemsize + 4)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        needs = f"a copy by cells of a matrix stored by genes (CSC) needs {needed / 1e9:.1f} GB"
        found = f"{needs}, {tempfile.gettempdir()} has {free / 1e9:.1f} GB free"
        raise input_error(
            found,
            "a matrix stored by cells (CSR), or room for the copy",
            "set TMPDIR to a folder with more room, or save the file with adata.X = adata.X.tocsr()",
        )
    return _mapped(n_values, dtype), _mapped(n_values, np.dtype(np.int32))


def _mapped(n_values: int, dtype: np.dtype) -> np.ndarray:
    if n_values == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    with tempfile.TemporaryFile() as file:  # has no name, so that nothing is left of it even if the process is killed
        return np.memmap(file, dtype=dtype, mode="w+", shape=(n_values,))


@jit
def _scatter(indptr: Any, row_of: Any, values: Any, first: int, cursor: Any, indices: Any, data: Any) -> None:
    for column in range(len(indptr) - 1):
        for k in range(indptr[column], indptr[column + 1]):
            at = cursor[row_of[k]]
            indices[at] = first + column
            data[at] = values[k]
            cursor[row_of[k]] = at + 1
