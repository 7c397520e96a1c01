"""Stored rows -> cells over vocabulary genes: reorder the columns, add up those of one gene, check every value; compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from annformer.kernels import GOLDEN, jit, mix


class Rows(NamedTuple):
    """Rows of a matrix as they are stored: CSR that may be unsorted, hold zeros or name a column twice."""

    indptr: Int[np.ndarray, "row+1"]
    """Starts at 0."""
    indices: Int[np.ndarray, "value"]
    data: np.ndarray


class Collapsed(NamedTuple):
    """The same rows as canonical CSR over the wanted genes, and what was seen on the way."""

    indptr: Int[np.ndarray, "row+1"]
    indices: Int[np.ndarray, "value"]
    data: Float[np.ndarray, "value"]
    first_bad: int
    """Position of the first value that is negative, NaN or infinite; -1 if none. The arrays are then meaningless."""
    fractions: bool
    """Some value is not a whole number."""


def collapse(rows: Rows, slots: Int[np.ndarray, "column"], n_slots: int, *, logarithms: bool = False) -> Collapsed:
    """Bring `rows` to canonical CSR over `n_slots` genes.

    Parameters
    ----------
    rows
        Rows as stored; every value is checked, also those in columns that are left out.
    slots
        For every stored column its place among the genes, or -1 to leave it out.
    n_slots
        Number of genes.
    logarithms
        The values are log1p of something, and that is what is added for the columns of one gene.

    Returns
    -------
    Values are float32 wherever that is exact for all of these rows, else float64. They do not depend on the order of the columns.
    """
    assert len(rows.data) < 2**31, "a block holds fewer than 2**31 values"
    narrow = np.can_cast(rows.data.dtype, np.float32, "safe")
    indptr = np.ascontiguousarray(rows.indptr, dtype=np.int64)
    indices = np.ascontiguousarray(rows.indices, dtype=np.int32)
    data: Any = np.ascontiguousarray(rows.data, dtype=np.float32 if narrow else np.float64)
    outside, bad, fractions = _check(indices, data, len(slots))
    if outside:
        msg = "a stored column number lies outside of the matrix"
        raise IndexError(msg)
    if bad:
        first_bad = int(np.flatnonzero(~((data >= 0) & (data < np.inf)))[0])
        return Collapsed(indptr, indices[:0], data[:0], first_bad, bool(fractions))
    targets = np.where(slots < 0, n_slots, slots).astype(np.int32)
    out_indptr, genes, values, inexact = _sorted_by_gene(indptr, indices, data, targets, n_slots, logarithms)
    if inexact:
        out_indptr, genes, values, _ = _sorted_by_gene(indptr, indices, data.astype(np.float64), targets, n_slots, logarithms)
    return Collapsed(out_indptr, genes, _narrowed(values), -1, bool(fractions))


def _narrowed(data: Float[np.ndarray, "value"]) -> Float[np.ndarray, "value"]:
    if data.dtype == np.float32:
        return data
    with np.errstate(over="ignore", under="ignore"):
        narrow = data.astype(np.float32)
    return narrow if np.array_equal(narrow, data) else data


@jit
def _check(indices: Any, data: Any, n_columns: int) -> Any:
    """Whether a column number lies outside, a value is unusable, a value is not whole; without branches, so that it is vectorised."""
    n_outside, n_bad, n_fractions = 0, 0, 0
    for k in range(len(data)):
        value = data[k]
        n_outside += (indices[k] < 0) | (indices[k] >= n_columns)
        n_bad += not (value >= 0 and value < np.inf)
        n_fractions += value != np.floor(value)
    return n_outside > 0, n_bad > 0, n_fractions > 0


@jit
def _bucket(indptr: Any, indices: Any, data: Any, targets: Any, n_slots: int) -> Any:
    """Sort the values by gene (counting sort), rows ascending within a gene; zeros and columns to leave out go behind the last gene."""
    begins = np.zeros(n_slots + 2, dtype=np.int32)
    for k in range(len(indices)):
        begins[(targets[indices[k]] if data[k] != 0 else n_slots) + 1] += 1
    for slot in range(n_slots + 1):
        begins[slot + 1] += begins[slot]
    ends = begins[:-1].copy()
    row_of = np.empty(len(data), dtype=np.int32)
    values = np.empty(len(data), dtype=data.dtype)
    out_indptr = np.zeros(len(indptr), dtype=np.int32)
    for row in range(len(indptr) - 1):
        n_kept = 0
        for k in range(indptr[row], indptr[row + 1]):
            value = data[k]
            target = targets[indices[k]] if value != 0 else n_slots
            end = ends[target]
            row_of[end] = row
            values[end] = value
            ends[target] = end + 1
            n_kept += target != n_slots
        out_indptr[row + 1] = out_indptr[row] + n_kept
    return begins, row_of, values, out_indptr


@jit
def _total(values: Any, logarithms: Any) -> Any:
    """Add up a row's values of one gene, from the smallest: floating-point sums depend on the order, and that of the columns means nothing.

    Of logarithms what lies behind them is added; the result is float32, so that the same values give the same in any type.
    """
    values.sort()
    total = 0.0
    for value in values:
        total += np.expm1(np.float64(value)) if logarithms else np.float64(value)
    return np.float64(np.float32(np.log1p(total))) if logarithms else total


@jit
def _unbucket(begins: Any, row_of: Any, values: Any, indptr: Any, n_slots: int, logarithms: Any) -> Any:
    """Deal the values out to their rows again: going through the genes in order leaves every row sorted.

    A row's values of one gene are added; `inexact` says that such a sum did not fit into the type of the values.
    """
    genes = np.empty(indptr[-1], dtype=np.int32)
    data = np.empty(indptr[-1], dtype=values.dtype)
    cursor = indptr[:-1].copy()
    inexact = False
    for slot in range(n_slots):
        k = begins[slot]
        while k < begins[slot + 1]:
            row = row_of[k]
            at = cursor[row]
            genes[at] = slot
            data[at] = values[k]
            cursor[row] = at + 1
            first = k
            k += 1
            while k < begins[slot + 1] and row_of[k] == row:
                k += 1
            if k > first + 1:
                total = _total(values[first:k], logarithms)
                data[at] = total
                inexact |= np.float64(data[at]) != total
    return cursor, genes, data, inexact


@jit
def _close_gaps(indptr: Any, ends: Any, genes: Any, data: Any) -> Any:
    """Move the rows together where added values have left room at their ends."""
    closed = np.zeros_like(indptr)
    for row in range(len(ends)):
        closed[row + 1] = closed[row] + ends[row] - indptr[row]
        for k in range(indptr[row], ends[row]):
            genes[closed[row] + k - indptr[row]] = genes[k]
            data[closed[row] + k - indptr[row]] = data[k]
    return closed, genes[: closed[-1]], data[: closed[-1]]


@jit
def _sorted_by_gene(indptr: Any, indices: Any, data: Any, targets: Any, n_slots: int, logarithms: Any) -> Any:
    begins, row_of, values, out_indptr = _bucket(indptr, indices, data, targets, n_slots)
    ends, genes, values, inexact = _unbucket(begins, row_of, values, out_indptr, n_slots, logarithms)
    if np.array_equal(ends, out_indptr[1:]):
        return out_indptr, genes, values, inexact
    out_indptr, genes, values = _close_gaps(out_indptr, ends, genes, values)
    return out_indptr, genes, values, inexact


def joined(parts: list[Collapsed]) -> Collapsed:
    """Put rows that were collapsed one block after another behind each other."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    data = np.concatenate([part.data for part in parts])
    return Collapsed(indptr, np.concatenate([part.indices for part in parts]), data, -1, any(part.fractions for part in parts))


def content_hashes(cells: Collapsed) -> UInt64[np.ndarray, "row"]:
    """Hash every row's (gene, value) pairs: equal cells have equal hashes, whatever their names."""
    return _hash_rows(cells.indptr, cells.indices, cells.data.astype(np.float64).view(np.uint64))


@jit
def _hash_rows(indptr: Any, indices: Any, bits: Any) -> Any:
    hashes = np.zeros(len(indptr) - 1, dtype=np.uint64)
    for row in range(len(hashes)):
        for k in range(indptr[row], indptr[row + 1]):
            hashes[row] += mix(bits[k] ^ (np.uint64(indices[k] + 1) * GOLDEN))
    return hashes


def bad_values(data: np.ndarray) -> dict[str, Bool[np.ndarray, "value"]]:
    """For each way in which a value can be unusable, where it is so."""
    return {"NaN": np.isnan(data), "infinite": np.isinf(data), "negative": np.isfinite(data) & (data < 0)}
