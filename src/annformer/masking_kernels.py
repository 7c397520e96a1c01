"""Compiled loops of `masking.py`: which genes are drawn, in what order tokens then stand, what their profile loses."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32, UInt64
from numpy import ndarray

from annformer.kernels import GOLDEN, LARGEST, jit, mix, threshold

ODD = np.uint64(0xD6E8FEB86659FD93)
"""What values are multiplied with, as genes are with `GOLDEN`: so a gene and a value that change places hash to something else."""


@jit
def smallest_hashes(
    offsets: Int[ndarray, "cell+1"],
    ids: UInt64[ndarray, "token"],
    values: UInt32[ndarray, "token"],
    share: float,
    run_key: np.uint64,
) -> Bool[ndarray, "token"]:
    """Mark int(n * share) of the n tokens behind the first one of each cell: those with the smallest hashes of (cell, gene)."""
    chosen = np.zeros(len(ids), np.bool_)
    hashes = np.empty(len(ids), np.uint64)
    for cell in range(len(offsets) - 1):
        first, end = offsets[cell], offsets[cell + 1]
        content = np.uint64(0)
        for i in range(first, end):
            content += mix(ids[i] * GOLDEN + np.uint64(values[i]) * ODD)
        key = mix(content + run_key)
        for i in range(first + 1, end):
            hashes[i] = mix(ids[i] * GOLDEN + key)
        n_chosen = int((end - first - 1) * share)
        if n_chosen > 0:
            limit = threshold(hashes[first + 1 : end], n_chosen) if n_chosen < end - first - 1 else LARGEST
            for i in range(first + 1, end):
                chosen[i] = hashes[i] <= limit
    return chosen


@jit
def asked_last(chosen: Bool[ndarray, "token"], offsets: Int[ndarray, "cell+1"]) -> tuple[Int[ndarray, "token"], Int[ndarray, "cell"]]:
    """Order of the tokens in which the chosen ones stand last in their cell, otherwise as before; and how many are chosen."""
    order, n_asked = np.empty(len(chosen), np.int64), np.zeros(len(offsets) - 1, np.int64)
    for cell in range(len(n_asked)):
        first, end = offsets[cell], offsets[cell + 1]
        for token in range(first, end):
            n_asked[cell] += chosen[token]
        visible, asked = first, end - n_asked[cell]
        for token in range(first, end):
            order[asked if chosen[token] else visible] = token
            asked += chosen[token]
            visible += not chosen[token]
    return order, n_asked


@jit
def hide_levels(
    offsets: Int[ndarray, "cell+1"],
    ids: Int[ndarray, "token"],
    chosen: Bool[ndarray, "token"],
    starts: Int[ndarray, "cell+1"],
    genes: Int[ndarray, "expressed"],
    levels: Float[ndarray, "expressed"],
) -> Float[ndarray, "expressed"]:
    """Levels of the genes that are not hidden, times expressed over not hidden genes of the cell."""
    n_ids = 0
    for gene in genes:
        n_ids = max(n_ids, gene + 1)
    hidden_in, changed = np.zeros(n_ids, np.int32), np.empty_like(levels)  # of each gene the cell that last hid it, counted from one
    for cell in range(len(starts) - 1):
        number, first, end = np.int32(cell + 1), starts[cell], starts[cell + 1]
        for token in range(offsets[cell], offsets[cell + 1]):
            if chosen[token] and ids[token] < n_ids:  # tokens of zeros stand in no profile
                hidden_in[ids[token]] = number
        n_hidden = 0
        for i in range(first, end):
            hidden = hidden_in[genes[i]] == number
            n_hidden += hidden
            changed[i] = np.float32(0) if hidden else levels[i]
        louder = np.float32(end - first) / np.float32(max(end - first - n_hidden, 1))
        for i in range(first, end):
            changed[i] *= louder
    return changed
