"""Expressed genes as tokens: their value bins, and which of them are kept in long cells."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Float, Int, UInt32, UInt64
from numpy import ndarray

from annformer.kernels import GOLDEN, jit, keep, mix

_ROWS_PER_SORT = 16  # rows of about equal length that are padded and sorted together
_TOO_LARGE = 1024  # whole numbers below it are tallied instead of sorted, and find their bins in a table
_LANES = np.uint32(8)  # tallies side by side: a value that follows itself does not wait for its last addition
_1, _32 = np.uint64(1), np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


def quantile_edges(
    starts: Int[ndarray, "cell+1"], data: Float[ndarray, "entry"], n_bins: int, rows: Int[ndarray, "row"] | None = None
) -> Float[ndarray, "row edge"]:
    """For each CSR row, or some rows, the n_bins - 1 quantiles of its entries; infinities for an empty row."""
    rows = np.arange(len(starts) - 1) if rows is None else rows
    lengths = starts[rows + 1] - starts[rows]
    edges = np.full((len(rows), n_bins - 1), np.inf)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    for first in range(0, len(order), _ROWS_PER_SORT):
        some = order[first : first + _ROWS_PER_SORT]
        table = np.empty((len(some), lengths[some[-1]]), data.dtype)
        _copy_rows(starts, data, rows[some], table)
        table.sort(axis=1)  # with vector instructions: faster than numba's sort
        _interpolate(lengths[some], table, quantiles_of(n_bins), some, edges)
    return edges


@cache
def quantiles_of(n_bins: int) -> Float[ndarray, "edge"]:
    """Where a cell's values are cut into bins."""
    return np.linspace(0, 1, n_bins - 1)


@jit
def _copy_rows(
    starts: Int[ndarray, "cell+1"], data: Float[ndarray, "entry"], rows: Int[ndarray, "row"], table: Float[ndarray, "row entry"]
) -> None:
    for number, row in enumerate(rows):
        n = starts[row + 1] - starts[row]
        table[number, :n] = data[starts[row] : starts[row + 1]]
        table[number, n:] = np.inf


@jit
def _interpolate(
    lengths: Int[ndarray, "row"],
    table: Float[ndarray, "row entry"],
    quantiles: Float[ndarray, "edge"],
    places: Int[ndarray, "row"],
    edges: Float[ndarray, "cell edge"],
) -> None:
    """Quantiles of sorted rows."""
    for row in range(len(lengths)):
        last = lengths[row] - 1
        for edge in range(len(quantiles)):
            position = quantiles[edge] * last
            rank = int(position)
            edges[places[row], edge] = _between(np.float64(table[row, rank]), np.float64(table[row, min(rank + 1, last)]), position - rank)


@jit
def _between(low: float, high: float, share: float) -> float:
    """Linear interpolation, rounded as numpy rounds it: whether a value equals an edge hangs on the last bit."""
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


@jit
def fill_expressed(
    cells: Int[ndarray, "some"],
    edges: Float[ndarray, "some edge"],
    starts: Int[ndarray, "cell+1"],
    columns: UInt32[ndarray, "entry"],
    data: Float[ndarray, "entry"],
    gene_ids: Int[ndarray, "gene"],
    keys: UInt64[ndarray, "gene"],
    seed: int,
    step: int,
    cls_id: int,
    cls_value: float,
    quantiles: Float[ndarray, "edge"],
    offsets: Int[ndarray, "cell+1"],
    n_kept: Int[ndarray, "cell"],
    ids: Int[ndarray, "token"],
    values: Float[ndarray, "token"],
    cell_keys: UInt64[ndarray, "cell"],
) -> Int[ndarray, "other"]:
    """Write `<cls>` and, at the end of the cell's place, `n_kept` of its expressed genes; `cell_keys` gets what further draws hash with.

    Without `edges` the cells that hold no small counts are left alone and returned.

    Indices are unsigned: a signed one may be negative, and the check for that takes longer than many of these loops.
    """
    longest = 0
    for cell in cells:
        longest = max(longest, starts[cell + 1] - starts[cell])
    hashes, kept, counts = np.empty(longest, np.uint64), np.empty(longest + 1, np.uint32), np.empty(longest, np.uint32)
    tallies, found = np.zeros((_TOO_LARGE, _LANES), np.int32), np.empty(len(quantiles))
    others, n_others = np.empty(len(cells), np.int64), 0
    run_key = mix(mix(np.uint64(seed) + GOLDEN) + np.uint64(step))
    for number, cell in enumerate(cells):
        ids[offsets[cell]], values[offsets[cell]] = cls_id, cls_value
        first, n, place, end = starts[cell], starts[cell + 1] - starts[cell], offsets[cell + 1] - n_kept[cell], offsets[cell + 1]
        if n == 0:
            continue
        here, numbers, values_here = columns[first : first + n], data[first : first + n], values[place:end]
        counted = len(quantiles) > 0 and len(edges) == 0
        largest = _as_counts(numbers, counts[:n]) if counted else 0
        if largest < 0:
            others[n_others] = cell
            n_others += 1
            continue
        cell_keys[cell] = _hash_genes(here, keys, numbers, run_key, hashes[:n])
        keep(hashes[:n], end - place, kept)
        chosen = kept[: end - place]
        _take(chosen, here, gene_ids, ids[place:end])
        if len(quantiles) == 0:
            for i in range(len(chosen)):
                values_here[i] = numbers[chosen[i]]
        elif counted:
            _tally(counts[:n], largest, tallies, quantiles, found)
            _look_up(counts, hashes, chosen, largest, found, values_here)
        else:
            _search(numbers, hashes, chosen, edges[number], values_here)
    return others[:n_others]


@jit
def _as_counts(numbers: Float[ndarray, "gene"], counts: UInt32[ndarray, "gene"]) -> int:
    """The numbers as integers; returns the largest of them if all are whole and small, else -1."""
    largest, other = np.int32(0), np.int32(0)
    limit, zero = numbers.dtype.type(_TOO_LARGE), numbers.dtype.type(0)
    for i in range(len(numbers)):
        count = np.int32(max(min(numbers[i], limit), zero))
        other |= np.int32(count != numbers[i])
        largest = max(largest, count)
        counts[i] = np.uint32(count)
    return -1 if other or largest == _TOO_LARGE else int(largest)


@jit
def _hash_genes(
    columns: UInt32[ndarray, "gene"],
    keys: UInt64[ndarray, "column"],
    numbers: Float[ndarray, "gene"],
    run_key: np.uint64,
    hashes: UInt64[ndarray, "gene"],
) -> np.uint64:
    """One number per gene, a bijection of the gene's id for a given cell, so that no two genes of a cell share one.

    Returns the cell's key, with which any other gene is hashed likewise.
    """
    for i in range(len(columns)):  # not in one loop with the next: each becomes vector instructions only by itself
        hashes[i] = keys[columns[i]]
    content = np.uint64(0)
    for i in range(
        len(columns)
    ):  # as in NH, a universal hash: the product of both halves of the value, each shifted by half of the gene's key
        bits = np.float64(numbers[i]).view(np.uint64)
        product = ((hashes[i] + bits) & _LOW_HALF) * (((hashes[i] >> _32) + (bits >> _32)) & _LOW_HALF)
        content += product ^ (product >> _32)  # without this, a change of one value would shift the sum by one half of the key only
    key = mix(content + run_key)
    for i in range(len(columns)):
        hashes[i] = mix(hashes[i] + key)
    return key


@jit
def _take(
    chosen: UInt32[ndarray, "token"], columns: UInt32[ndarray, "gene"], gene_ids: Int[ndarray, "column"], ids: Int[ndarray, "token"]
) -> None:
    for i in range(len(chosen)):
        ids[i] = gene_ids[columns[chosen[i]]]


@jit
def _tally(
    counts: UInt32[ndarray, "gene"],
    largest: int,
    tallies: Int[ndarray, "count lane"],
    quantiles: Float[ndarray, "edge"],
    edges: Float[ndarray, "edge"],
) -> None:
    """Quantiles of counts; leaves `tallies` as it found them, all zero."""
    for i in range(len(counts)):
        tallies[counts[i], np.uint32(i) & (_LANES - np.uint32(1))] += np.int32(1)
    distinct, ends, n_distinct, end = np.empty(largest + 1), np.empty(largest + 1, np.int64), 0, 0
    for count in range(largest + 1):
        n = 0
        for lane in range(_LANES):
            n += int(tallies[count, lane])
            tallies[count, lane] = 0
        end += n
        distinct[n_distinct], ends[n_distinct] = count, end
        n_distinct += n > 0
    place = 0
    for edge in range(len(quantiles)):
        position = quantiles[edge] * (len(counts) - 1)
        rank = int(position)
        while ends[place] <= rank:
            place += 1
        following = place + (rank + 1 == ends[place] and place + 1 < n_distinct)
        edges[edge] = _between(distinct[place], distinct[following], position - rank)


@jit
def _look_up(
    counts: UInt32[ndarray, "gene"],
    hashes: UInt64[ndarray, "gene"],
    chosen: UInt32[ndarray, "token"],
    largest: int,
    edges: Float[ndarray, "edge"],
    values: Float[ndarray, "token"],
) -> None:
    """Bins of counts, by a table of every count's highest bin and ties."""
    highest, n_ties, place = np.empty(largest + 1, np.int32), np.zeros(largest + 1, np.uint64), 0
    for count in range(largest + 1):
        while place < len(edges) and edges[place] <= count:
            n_ties[count] += np.uint64(edges[place] == count)
            place += 1
        highest[count], n_ties[count] = place, max(n_ties[count], _1)
    for i in range(len(chosen)):
        gene = chosen[i]
        values[i] = _lowered(highest[counts[gene]], n_ties[counts[gene]], hashes[gene])


@jit
def _search(
    numbers: Float[ndarray, "gene"],
    hashes: UInt64[ndarray, "gene"],
    chosen: UInt32[ndarray, "token"],
    edges: Float[ndarray, "edge"],
    values: Float[ndarray, "token"],
) -> None:
    """Bins of any numbers, by comparing each with all edges."""
    others = np.zeros(len(edges) + 1, np.uint64)  # edges that equal the one on which bin i begins
    for i in range(2, len(others)):
        others[i] = others[i - 1] + _1 if edges[i - 1] == edges[i - 2] else np.uint64(0)
    for i in range(len(chosen)):
        value, highest = np.float64(numbers[chosen[i]]), 0
        for edge in range(len(edges)):  # vector instructions make this three times faster than a binary search in 50 edges
            highest += edges[edge] <= value
        n_ties = _1 + others[highest] * np.uint64(edges[highest - 1] == value)
        values[i] = _lowered(np.int32(highest), n_ties, hashes[chosen[i]])


@jit
def _lowered(highest: np.int32, n_ties: np.uint64, hashed: np.uint64) -> np.int32:
    """One of the `n_ties` bins up to the highest, by the half of the hash that had no say in the choice of genes."""
    return highest - np.int32(((hashed & _LOW_HALF) * n_ties) >> _32)
