"""Some of the cells of a source, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int

from annformer.data.anndata import AnnDataSource
from annformer.genes import GeneMatch
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab


class Chosen:
    """Some of the cells of a source, as a source."""

    def __init__(self, source: AnnDataSource, rows: Int[np.ndarray, "cell"]) -> None:
        self._source, self._rows = source, rows

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self._rows)

    @property
    def obs_names(self) -> np.ndarray:
        """Name of every cell, in order."""
        return self._source.obs_names[self._rows]

    def match(self, vocab: GeneVocab) -> GeneMatch:
        """Find the source's columns in `vocab`."""
        return self._source.match(vocab)

    def batches(
        self,
        size: int,
        *,
        vocab: GeneVocab,
        label_keys: Mapping[str, str] | None = None,
        rows: Int[np.ndarray, "cell"] | None = None,
        start: int = 0,
    ) -> Iterator[CellBatch]:
        """Yield the chosen cells in order."""
        chosen = self._rows if rows is None else self._rows[rows]
        return self._source.batches(size, vocab=vocab, label_keys=label_keys, rows=chosen, start=start)
