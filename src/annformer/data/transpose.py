"""A matrix stored by columns on disk -> a temporary one by rows, in bounded memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from annformer.data.collapse import Rows
from annformer.errors import input_error

if TYPE_CHECKING:
    from annformer.data.readers import RowReader


def write_rows(columns: RowReader) -> tuple[Rows, Path]:
    """Write what `columns` reads (the transposed matrix) by rows into temporary files.

    Two passes: count the values of each row, then put every value in its place.

    Returns
    -------
    The rows, memory-mapped, and the folder to delete after use; it lies in the system's temporary folder (TMPDIR).
    """
    n_rows = columns.shape[1]
    lengths = np.zeros(n_rows, dtype=np.int64)
    for _, part in _blocks(columns):
        lengths += np.bincount(part.indices, minlength=n_rows)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    data, indices, folder = _scratch(columns.n_values, columns.dtype)
    cursor = indptr[:-1].copy()
    for first, part in _blocks(columns):
        _scatter(part.indptr, part.indices.astype(np.int64), part.data, first, cursor, indices, data)
    return Rows(indptr, indices, data), folder


def _blocks(columns: RowReader) -> Iterator[tuple[int, Rows]]:
    step = columns.rows_at_once
    for first in range(0, columns.shape[0], step):
        part = columns.read(first, min(first + step, columns.shape[0]))
        if len(part.indices) and not 0 <= int(part.indices.min()) <= int(part.indices.max()) < columns.shape[1]:
            msg = "a stored row number lies outside of the matrix"
            raise IndexError(msg)
        yield first, part


def _scratch(n_values: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, Path]:
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
    folder = Path(tempfile.mkdtemp(prefix="annformer-"))
    if n_values == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype), np.empty(0, np.int32), folder
    data = np.memmap(folder / "data", dtype=dtype, mode="w+", shape=(n_values,))
    return data, np.memmap(folder / "indices", dtype=np.int32, mode="w+", shape=(n_values,)), folder


@njit(cache=True, nogil=True)
def _scatter(indptr: Any, row_of: Any, values: Any, first: int, cursor: Any, indices: Any, data: Any) -> None:
    for column in range(len(indptr) - 1):
        for k in range(indptr[column], indptr[column + 1]):
            at = cursor[row_of[k]]
            indices[at] = first + column
            data[at] = values[k]
            cursor[row_of[k]] = at + 1
