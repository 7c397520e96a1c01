"""What tells whether two cells are the same: order-free hashes of their (gene, value) pairs, whole or over chosen genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int, UInt64

from annformer.data.studies import Study, StudyCells
from annformer.genes import GeneMatch
from annformer.kernels import GOLDEN, jit, mix, mix_in_place
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab

logger = logging.getLogger(__name__)

N_BANDS: Final = 4
"""Cells of two files are compared over the genes that both files have, and over four disjoint quarters of these; one that is equal is
enough: a gene that one of the files counted otherwise spoils its own quarter only, and shallow cells are compared as a whole."""
MIN_EXPRESSED: Final = 15
"""Fewest expressed genes of a comparison; with fewer, different cells may look alike."""
CELLS_PER_READ: Final = 1024


def cell_keys(
    cells: CellBatch, bands: Int[np.ndarray, "token"], n_bands: int = 1
) -> tuple[UInt64[np.ndarray, "cell band"], Int[np.ndarray, "cell band"]]:
    """Hash every cell, once for each band of genes.

    Parameters
    ----------
    bands
        For every id of the vocabulary the band that the gene counts for; -1: none.

    Returns
    -------
    The hashes, and how many expressed genes each stands for.
    """
    counts = cells.counts
    bits = counts.data.astype(np.float64).view(np.uint64)
    return _keys(counts.indptr, counts.indices, bits, np.asarray(cells.gene_ids), bands, n_bands)


@jit
def _keys(indptr: Any, indices: Any, bits: Any, gene_ids: Any, bands: Any, n_bands: int) -> Any:
    keys = np.zeros((len(indptr) - 1, n_bands), dtype=np.uint64)
    expressed = np.zeros((len(indptr) - 1, n_bands), dtype=np.int32)
    for row in range(len(keys)):
        for k in range(indptr[row], indptr[row + 1]):
            gene = gene_ids[indices[k]]
            band = bands[gene]
            if band >= 0:
                keys[row, band] += mix(bits[k] ^ (np.uint64(gene + 1) * GOLDEN))
                expressed[row, band] += 1
    return keys, expressed


def shuffled(keys: UInt64[np.ndarray, "cell"], seed: int) -> UInt64[np.ndarray, "cell"]:
    """Draw keys anew by `seed`: equal ones stay equal, their order is random."""
    with np.errstate(over="ignore"):
        drawn = keys + np.uint64(seed) * np.uint64(0xD6E8FEB86659FD93) + GOLDEN
        mix_in_place(drawn)
    return drawn


@dataclass(frozen=True)
class Held:
    """Keys of the cells of one held-out data set over the genes that it shares with a study."""

    name: str
    bands: Int[np.ndarray, "token"]
    keys: tuple[UInt64[np.ndarray, "key"], ...]
    """For each band, and last for all of them together, sorted."""

    def found(self, cells: CellBatch) -> Bool[np.ndarray, "cell"]:
        """Whether each cell is one of the held-out ones."""
        keys, enough = _comparable(cells, self.bands)
        same = [contains(known, keys[:, band]) & enough[:, band] for band, known in enumerate(self.keys)]
        return np.logical_or.reduce(same)


class HeldOut:
    """Data sets whose cells must not get into a store; they stay open.

    Parameters
    ----------
    studies
        By name.
    vocab
        Genes in whose terms cells are compared.
    """

    def __init__(self, studies: Mapping[str, Study], vocab: GeneVocab) -> None:
        self.vocab = vocab
        self._cells = {name: study.open(min_match=0.0) for name, study in studies.items()}

    def against(self, match: GeneMatch, study: str) -> list[Held]:
        """Keys of all their cells over the genes that they share with the columns that `match` found in `study`.

        Every data set is read again for every `match`, because the genes that two files share decide what can be compared; only keys are
        kept.
        """
        held = []
        for name, cells in self._cells.items():
            bands = _shared_bands(match, cells.match(self.vocab))
            if (bands >= 0).sum() < N_BANDS * MIN_EXPRESSED:
                n_shared = int((bands >= 0).sum())
                logger.warning("%s and %s share %d genes only: whether they share cells is hard to see", study, name, n_shared)
            held.append(Held(name, bands, _keys_of(cells, self.vocab, bands)))
        return held

    def close(self) -> None:
        """Close the files."""
        for cells in self._cells.values():
            cells.close()


def _comparable(cells: CellBatch, bands: Int[np.ndarray, "token"]) -> tuple[UInt64[np.ndarray, "cell band"], Bool[np.ndarray, "cell band"]]:
    """Keys by band and, as their sum is the key of all genes, over all bands; and which of them stand for enough expressed genes."""
    keys, expressed = (np.column_stack([found, found.sum(axis=1, dtype=found.dtype)]) for found in cell_keys(cells, bands, N_BANDS))
    return keys, expressed >= MIN_EXPRESSED


def _keys_of(cells: StudyCells, vocab: GeneVocab, bands: Int[np.ndarray, "token"]) -> tuple[UInt64[np.ndarray, "key"], ...]:
    found: list[list[np.ndarray]] = [[] for _ in range(N_BANDS + 1)]
    for batch in cells.batches(CELLS_PER_READ, vocab=vocab):
        keys, enough = _comparable(batch, bands)
        for band, kept in enumerate(found):
            kept.append(keys[enough[:, band], band])
    return tuple(np.unique(np.concatenate(keys)) for keys in found)


def _shared_bands(*matches: GeneMatch) -> Int[np.ndarray, "token"]:
    """Bands of the genes for which each file has exactly one column: what was added up may have been added up otherwise."""
    n_tokens = len(matches[0].vocab)
    once = [np.bincount(match.ids[match.ids >= 0], minlength=n_tokens) == 1 for match in matches]
    return np.where(np.logical_and.reduce(once), np.arange(n_tokens) % N_BANDS, -1).astype(np.int8)


def contains(known: UInt64[np.ndarray, "key"], keys: UInt64[np.ndarray, "cell"]) -> Bool[np.ndarray, "cell"]:
    """Whether each key is among the known ones, which are ascending."""
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return known[place] == keys
