"""CellBatch -> TokenBatch: pick genes, bin their values by the cell's own quantiles, put `<cls>` first, pack.

A value bin is 0 for zero and 1 .. n_bins - 1 for the non-zero values of a cell, which are cut at n_bins - 1 quantiles of these same values
(float64, linear interpolation, exactly as `np.quantile` computes them). A value that equals m > 1 edges may stand in any of the m bins that
end there; which one is drawn, uniformly. Ties are common in counts, so this draw and the choice of genes in long cells are the only
randomness here, and both are hashes of (cell, gene): the cell's key is the order-free sum of the hashes of its (gene, value) pairs. So the
tokens of a cell depend on its content, the seed and the step, never on its neighbours, on row or column order, chunks, workers or dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numba
import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from numpy import ndarray
from pydantic import Field

from annformer.config import Config
from annformer.tokens import CellBatch, TokenBatch

_ROWS_PER_SORT = 16  # rows of about equal length that are padded and sorted together
_BUCKET_BITS = 9  # buckets of hashes: a few genes in each
_TOO_LARGE_COUNT = 1024.0  # cells with smaller counts only find their bins in a table
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))
_LOW_HALF = np.uint64(0xFFFFFFFF)


class TokenizerSettings(Config):
    """How cells become tokens; part of a model, because a network reads only values made the way it was trained on."""

    n_bins: int = Field(51, ge=2)
    """Value bins with the one for zero."""
    max_length: int = Field(1200, ge=2)
    """Most tokens of a cell, `<cls>` included; of longer cells a random choice of genes is kept."""
    cls_value: float = -2.0
    """Value at `<cls>`: -2 in pretraining and zero-shot use, 0 in the fine-tuning of the published models."""
    values: Literal["bins", "raw"] = "bins"
    """What the network gets: the value bin, or the value as it is."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of ties and of the choice of genes."""


def tokenize(cells: CellBatch, settings: TokenizerSettings, *, cls_id: int, step: int = 0) -> TokenBatch:
    """Turn cells into packed tokens, all of them visible.

    Bins are taken over all non-zero genes of a cell, before genes are chosen. A cell without any gene becomes a lone `<cls>`. Negative
    values, which data sources refuse, are binned like any other non-zero value.

    Parameters
    ----------
    step
        Training step: another step draws ties and genes anew. Leave it alone where results should repeat.
    """
    counts, gene_ids = _in_vocabulary_order(cells)
    starts, columns = counts.indptr.astype(np.int64), counts.indices.astype(np.int32, copy=False)
    offsets = np.zeros(len(starts), np.int64)
    np.cumsum(np.minimum(np.diff(starts), settings.max_length - 1) + 1, out=offsets[1:])
    ids, values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
    edges = quantile_edges(starts, counts.data, settings.n_bins) if settings.values == "bins" else np.empty((len(starts) - 1, 0))
    ids[offsets[:-1]], values[offsets[:-1]] = cls_id, settings.cls_value
    _fill(starts, columns, counts.data, gene_ids, edges, settings.seed, step, offsets, ids, values)
    packed = torch.from_numpy(offsets)
    return TokenBatch(
        gene_ids=torch.from_numpy(ids),
        values=torch.from_numpy(values),
        flags=None,
        dose=None,
        offsets=packed,
        n_visible=packed.diff(),
        targets=None,
        modality=None,
        labels={name: torch.from_numpy(codes.astype(np.int64)) for name, codes in cells.labels.items()},
        cell=None,
    )


def quantile_edges(starts: Int[ndarray, "cell+1"], data: Float[ndarray, "entry"], n_bins: int) -> Float[ndarray, "cell edge"]:
    """For each CSR row the n_bins - 1 quantiles of its entries; infinities for an empty row."""
    quantiles = np.linspace(0, 1, n_bins - 1)
    lengths = np.diff(starts)
    edges = np.full((len(lengths), n_bins - 1), np.inf)
    rows = np.argsort(lengths, kind="stable")
    rows = rows[lengths[rows] > 0]
    for first in range(0, len(rows), _ROWS_PER_SORT):
        some = rows[first : first + _ROWS_PER_SORT]
        table = np.empty((len(some), lengths[some[-1]]), data.dtype)
        _copy_rows(starts, data, some, table)
        table.sort(axis=1)  # with vector instructions: faster than numba's sort, and than a histogram of the few values that counts take
        _interpolate(lengths, some, table, quantiles, edges)
    return edges


def _in_vocabulary_order(cells: CellBatch) -> tuple[Any, Int[ndarray, "gene"]]:
    gene_ids = np.asarray(cells.gene_ids, np.int64)
    if np.all(gene_ids[1:] > gene_ids[:-1]):
        return cells.counts, gene_ids
    order = np.argsort(gene_ids)
    return cells.counts.tocsc()[:, order].tocsr(), gene_ids[order]  # both conversions are linear; sorting indices in rows is slower


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile in every process
        return numba.njit(function, nogil=True)


@_jit
def _mix(x: np.uint64) -> np.uint64:
    """Finaliser of splitmix64: a bijection in which every bit of x reaches every bit of the result."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


@_jit
def _copy_rows(
    starts: Int[ndarray, "cell+1"], data: Float[ndarray, "entry"], rows: Int[ndarray, "row"], table: Float[ndarray, "row entry"]
) -> None:
    for number, row in enumerate(rows):
        n = starts[row + 1] - starts[row]
        table[number, :n] = data[starts[row] : starts[row + 1]]
        table[number, n:] = np.inf


@_jit
def _interpolate(
    lengths: Int[ndarray, "cell"],
    rows: Int[ndarray, "row"],
    table: Float[ndarray, "row entry"],
    quantiles: Float[ndarray, "edge"],
    edges: Float[ndarray, "cell edge"],
) -> None:
    """Quantiles of sorted rows, rounded as numpy rounds them: whether a value equals an edge hangs on the last bit."""
    for number, row in enumerate(rows):
        last = lengths[row] - 1
        for edge in range(len(quantiles)):
            position = quantiles[edge] * last
            rank = int(position)
            low, high, share = np.float64(table[number, rank]), np.float64(table[number, min(rank + 1, last)]), position - rank
            edges[row, edge] = high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


@_jit
def _fill(
    starts: Int[ndarray, "cell+1"],
    columns: Int[ndarray, "entry"],
    data: Float[ndarray, "entry"],
    gene_ids: Int[ndarray, "gene"],
    edges: Float[ndarray, "cell edge"],
    seed: int,
    step: int,
    offsets: Int[ndarray, "cell+1"],
    ids: Int[ndarray, "token"],
    values: Float[ndarray, "token"],
) -> None:
    """Write the tokens after each `<cls>`; where `edges` has no columns, values stay as they are."""
    longest = 0
    for cell in range(len(edges)):
        longest = max(longest, starts[cell + 1] - starts[cell])
    exact, hashes, kept = np.empty(longest), np.empty(longest, np.uint64), np.empty(longest + 1, np.int32)
    run_key = _mix(_mix(np.uint64(seed) + _ODD) + np.uint64(step))
    spread = gene_ids.astype(np.uint64) * _ODD
    for cell in range(len(edges)):
        first, n, place = starts[cell], starts[cell + 1] - starts[cell], offsets[cell] + 1
        n_kept = offsets[cell + 1] - place
        for i in range(n):
            exact[i] = data[first + i]
        _hash_genes(columns[first : first + n], spread, exact[:n], run_key, hashes[:n])
        if n_kept < n:
            _keep(hashes[:n], _smallest(hashes[:n], n_kept), kept)
            for i in range(n_kept):  # an entry never moves back, so nothing is overwritten before it is read
                exact[i], hashes[i] = exact[kept[i]], hashes[kept[i]]
                ids[place + i] = gene_ids[columns[first + kept[i]]]
        else:
            for i in range(n):
                ids[place + i] = gene_ids[columns[first + i]]
        if edges.shape[1] == 0:
            values[place : place + n_kept] = exact[:n_kept]
        else:
            _bin(exact[:n_kept], hashes[:n_kept], edges[cell], values[place : place + n_kept])


@_jit
def _hash_genes(
    columns: Int[ndarray, "gene"],
    spread: UInt64[ndarray, "column"],
    exact: Float[ndarray, "gene"],
    run_key: np.uint64,
    hashes: UInt64[ndarray, "gene"],
) -> None:
    """One number per gene, a bijection of the gene's id for a given cell, so that no two genes of a cell share one."""
    bits = exact.view(np.uint64)
    content = np.uint64(0)
    for i in range(len(columns)):  # not in one loop with the next: each becomes vector instructions only by itself
        hashes[i] = spread[columns[i]]
    for i in range(len(columns)):
        content += _mix(hashes[i] ^ bits[i])
    key = _mix(content + run_key)
    for i in range(len(columns)):
        hashes[i] = _mix(hashes[i] + key)


@_jit
def _smallest(hashes: UInt64[ndarray, "gene"], n: int) -> np.uint64:
    """The n-th smallest hash: evenly spread numbers need one pass into buckets and the sorting of the few in a single bucket."""
    shift = np.uint64(64 - _BUCKET_BITS)
    buckets = np.zeros(1 << _BUCKET_BITS, np.int32)
    for i in range(len(hashes)):
        buckets[np.int64(hashes[i] >> shift)] += 1
    bucket, below = 0, 0
    while below + buckets[bucket] < n:
        below += buckets[bucket]
        bucket += 1
    inside, n_inside = np.empty(buckets[bucket], np.uint64), 0
    for i in range(len(hashes)):
        if np.int64(hashes[i] >> shift) == bucket:
            place = n_inside
            while place > 0 and inside[place - 1] > hashes[i]:
                inside[place] = inside[place - 1]
                place -= 1
            inside[place] = hashes[i]
            n_inside += 1
    return inside[n - below - 1]


@_jit
def _keep(hashes: UInt64[ndarray, "gene"], largest: np.uint64, kept: Int[ndarray, "gene+1"]) -> None:
    """List the genes whose hash is at most `largest`, in their order. Writing first and counting then avoids a branch."""
    place = 0
    for i in range(len(hashes)):
        kept[place] = i
        place += hashes[i] <= largest


@_jit
def _bin(
    exact: Float[ndarray, "gene"], hashes: UInt64[ndarray, "gene"], edges: Float[ndarray, "edge"], values: Float[ndarray, "gene"]
) -> None:
    """Bins of the values: the number of edges not above the value, lowered at random where several edges equal it."""
    others = np.zeros(len(edges) + 1, np.uint64)  # edges that equal the one on which bin i begins
    for i in range(2, len(others)):
        others[i] = others[i - 1] + np.uint64(1) if edges[i - 1] == edges[i - 2] else np.uint64(0)
    n_counts = _largest_count(exact) + 1
    if n_counts > 0:
        _look_up(exact, hashes, edges, others, n_counts, values)
    else:
        _search(exact, hashes, edges, others, values)


@_jit
def _largest_count(exact: Float[ndarray, "gene"]) -> int:
    """Largest of the values if all are whole and small enough for a table of bins, else -1."""
    largest, other = np.int32(0), np.int32(0)
    for i in range(len(exact)):
        count = np.int32(max(min(exact[i], _TOO_LARGE_COUNT), 0.0))
        other |= np.int32(count != exact[i])
        largest = max(largest, count)
    return -1 if other or largest == _TOO_LARGE_COUNT else int(largest)


@_jit
def _look_up(
    exact: Float[ndarray, "gene"],
    hashes: UInt64[ndarray, "gene"],
    edges: Float[ndarray, "edge"],
    others: UInt64[ndarray, "bin"],
    n_counts: int,
    values: Float[ndarray, "gene"],
) -> None:
    highest, n_ties, place = np.empty(n_counts, np.int32), np.empty(n_counts, np.uint64), 0
    for count in range(n_counts):
        while place < len(edges) and edges[place] <= count:
            place += 1
        highest[count] = place
        n_ties[count] = np.uint64(1) + others[place] * np.uint64(edges[place - 1] == count)
    for i in range(len(exact)):
        value = np.int32(exact[i])
        values[i] = _lowered(highest[value], n_ties[value], hashes[i])


@_jit
def _search(
    exact: Float[ndarray, "gene"],
    hashes: UInt64[ndarray, "gene"],
    edges: Float[ndarray, "edge"],
    others: UInt64[ndarray, "bin"],
    values: Float[ndarray, "gene"],
) -> None:
    for i in range(len(exact)):
        value, highest = exact[i], 0
        for edge in range(len(edges)):  # vector instructions make this three times faster than a binary search in 50 edges
            highest += edges[edge] <= value
        n_ties = np.uint64(1) + others[highest] * np.uint64(edges[highest - 1] == value)
        values[i] = _lowered(np.int32(highest), n_ties, hashes[i])


@_jit
def _lowered(highest: np.int32, n_ties: np.uint64, hashed: np.uint64) -> np.int32:
    """One of the `n_ties` bins up to the highest, by the half of the hash that had no say in the choice of genes."""
    return highest - np.int32(((hashed & _LOW_HALF) * n_ties) >> _32)
