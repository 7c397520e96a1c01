"""Genes that a cell does not express as tokens of value 0, drawn by hash."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32, UInt64
from numpy import ndarray

from annformer.kernels import jit, keep, mix


@jit
def add_zeros(
    starts: Int[ndarray, "cell+1"],
    columns: UInt32[ndarray, "entry"],
    measured: Bool[ndarray, "study gene"],
    study: Int[ndarray, "cell"],
    gene_ids: Int[ndarray, "gene"],
    gene_keys: UInt64[ndarray, "gene"],
    cell_keys: UInt64[ndarray, "cell"],
    n_zeros: Int[ndarray, "cell"],
    offsets: Int[ndarray, "cell+1"],
    ids: Int[ndarray, "token"],
    values: Float[ndarray, "token"],
) -> None:
    """Put `n_zeros` of the genes that were measured and that a cell does not express among those that already stand at its place's end."""
    n_genes = len(gene_ids)
    at_zero, zeros, hashes = np.empty(n_genes, np.bool_), np.empty(n_genes + 1, np.int64), np.empty(n_genes + 1, np.uint64)
    kept = np.empty(n_genes + 1, np.uint32)
    for cell in range(len(n_zeros)):
        if n_zeros[cell] == 0:
            continue
        at_zero[:] = measured[study[cell]]
        at_zero[columns[starts[cell] : starts[cell + 1]]] = False
        n = _hash_zeros(at_zero, gene_ids, gene_keys, cell_keys[cell], zeros, hashes)
        keep(hashes[:n], n_zeros[cell], kept)
        place, end = offsets[cell] + 1, offsets[cell + 1]
        _merge(kept[: n_zeros[cell]], zeros, ids[place:end], values[place:end])


@jit
def _hash_zeros(
    at_zero: Bool[ndarray, "gene"],
    gene_ids: Int[ndarray, "gene"],
    gene_keys: UInt64[ndarray, "gene"],
    cell_key: np.uint64,
    zeros: Int[ndarray, "gene+1"],
    hashes: UInt64[ndarray, "gene+1"],
) -> int:
    """List the genes that a cell may have as zeros and the hashes they are chosen by; return how many. Written first, counted then."""
    n = 0
    for gene in range(len(at_zero)):
        zeros[n], hashes[n] = gene_ids[gene], mix(gene_keys[gene] + cell_key)
        n += at_zero[gene]
    return n


@jit
def _merge(
    kept: UInt32[ndarray, "zero"], zeros: Int[ndarray, "gene+1"], ids: Int[ndarray, "token"], values: Float[ndarray, "token"]
) -> None:
    """Bring zeros and the expressed genes, which stand at the end, into one ascending row; what is left in the end stands in its place."""
    place, expressed = 0, len(kept)
    for i in range(len(kept)):
        gene = zeros[kept[i]]
        while expressed < len(ids) and ids[expressed] < gene:
            ids[place], values[place] = ids[expressed], values[expressed]
            place, expressed = place + 1, expressed + 1
        ids[place], values[place] = gene, 0
        place += 1
