"""CellBatch -> TokenBatch: pick genes, bin their values by the cell's own quantiles, put `<cls>` first, pack.

A value bin is 0 for zero and 1 .. n_bins - 1 for the non-zero values of a cell, which are cut at n_bins - 1 quantiles of these same values
(float64, linear interpolation, exactly as `np.quantile` computes them). A value that equals m > 1 edges may stand in any of the m bins that
end there; which one is drawn, uniformly. Ties are common in counts, so this draw and the choice of genes in long cells are the only
randomness here, and both are hashes of (cell, gene): the cell's key is the order-free sum of the hashes of its (gene, value) pairs. So the
tokens of a cell depend on its content, the seed and the step, never on its neighbours, on row or column order, chunks, workers or dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt32, UInt64
from numpy import ndarray
from pydantic import Field

from annformer.config import Config
from annformer.kernels import GOLDEN, jit, mix
from annformer.tokens import CellBatch, TokenBatch

_ROWS_PER_SORT = 16  # rows of about equal length that are padded and sorted together
_TOO_LARGE = 1024  # whole numbers below it are tallied instead of sorted, and find their bins in a table
_LANES = np.uint32(8)  # tallies side by side: a value that follows itself does not wait for its last addition
_1, _32 = np.uint64(1), np.uint64(32)
_LOW_HALF, _LARGEST = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFFFFFFFFFF)


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
    starts, columns = counts.indptr.astype(np.int64), counts.indices.astype(np.int32, copy=False).view(np.uint32)
    offsets = np.zeros(len(starts), np.int64)
    np.cumsum(np.minimum(starts[1:] - starts[:-1], settings.max_length - 1) + 1, out=offsets[1:])
    ids, values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
    quantiles = _quantiles(settings.n_bins if settings.values == "bins" else 1)
    given = (starts, columns, counts.data, gene_ids, _gene_keys(gene_ids), settings.seed, step, cls_id, settings.cls_value, quantiles)
    others = _fill(np.arange(len(starts) - 1), np.empty((0, 0)), *given, offsets, ids, values)
    if len(others):
        _fill(others, quantile_edges(starts, counts.data, settings.n_bins, others), *given, offsets, ids, values)
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
        _interpolate(lengths[some], table, _quantiles(n_bins), some, edges)
    return edges


@cache
def _quantiles(n_bins: int) -> Float[ndarray, "edge"]:
    return np.linspace(0, 1, n_bins - 1)


def _in_vocabulary_order(cells: CellBatch) -> tuple[Any, Int[ndarray, "gene"]]:
    gene_ids = np.asarray(cells.gene_ids, np.int64)
    if np.all(gene_ids[1:] > gene_ids[:-1]):
        return cells.counts, gene_ids
    order = np.argsort(gene_ids)
    return cells.counts.tocsc()[:, order].tocsr(), gene_ids[order]  # both conversions are linear; sorting indices in rows is slower


@jit
def _gene_keys(gene_ids: Int[ndarray, "gene"]) -> UInt64[ndarray, "gene"]:
    keys = np.empty(len(gene_ids), np.uint64)
    for gene in range(len(gene_ids)):
        keys[gene] = mix(np.uint64(gene_ids[gene]) * GOLDEN)
    return keys


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
def _fill(
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
    ids: Int[ndarray, "token"],
    values: Float[ndarray, "token"],
) -> Int[ndarray, "other"]:
    """Write the tokens of cells. Without `edges` the cells that hold no small counts are left alone and returned.

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
        first, n, place, end = starts[cell], starts[cell + 1] - starts[cell], offsets[cell] + 1, offsets[cell + 1]
        if n == 0:
            continue
        here, numbers, values_here = columns[first : first + n], data[first : first + n], values[place:end]
        counted = len(quantiles) > 0 and len(edges) == 0
        largest = _as_counts(numbers, counts[:n]) if counted else 0
        if largest < 0:
            others[n_others] = cell
            n_others += 1
            continue
        _hash_genes(here, keys, numbers, run_key, hashes[:n])
        _keep(hashes[:n], _threshold(hashes[:n], end - place) if end - place < n else _LARGEST, kept)
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
) -> None:
    """One number per gene, a bijection of the gene's id for a given cell, so that no two genes of a cell share one."""
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


@jit
def _threshold(hashes: UInt64[ndarray, "gene"], n: int) -> np.uint64:
    """A number that exactly n hashes do not exceed, found by interpolation: evenly spread numbers need four or five guesses."""
    low, high, n_low, n_high = np.uint64(0), _LARGEST, 0, len(hashes)
    while high - low > _1:
        guess = low + np.uint64(np.float64(high - low) * ((n - n_low + 0.5) / (n_high - n_low + 1)))
        guess = min(max(guess, low + _1), high - _1)
        n_guess = 0
        for i in range(len(hashes)):
            n_guess += hashes[i] <= guess
        if n_guess == n:
            return guess
        if n_guess < n:
            low, n_low = guess, n_guess
        else:
            high, n_high = guess, n_guess
    return high  # only if a column stands twice in a row: more than n hashes


@jit
def _keep(hashes: UInt64[ndarray, "gene"], threshold: np.uint64, kept: UInt32[ndarray, "gene+1"]) -> None:
    """List the genes whose hash is at most `threshold`, in their order. Writing first and counting then avoids a branch."""
    place = np.uint64(0)
    for i in range(len(hashes)):
        kept[place] = i
        place += np.uint64(hashes[i] <= threshold)


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
