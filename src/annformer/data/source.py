"""CellSource: what every place that cells come from can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from annformer.genes import GeneMatch
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab


@runtime_checkable
class CellSource(Protocol):
    """Cells that can be read in order, a batch at a time, as expression over the genes of a vocabulary."""

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        ...

    @property
    def obs_names(self) -> Sequence[str] | np.ndarray:
        """Name of every cell, in order."""
        ...

    def match(self, vocab: GeneVocab) -> GeneMatch:
        """Find the source's columns in `vocab`; refuses when too few are found."""
        ...

    def batches(
        self,
        size: int,
        *,
        vocab: GeneVocab,
        label_keys: Mapping[str, str] | None = None,
        rows: Int[np.ndarray, "cell"] | None = None,
        start: int = 0,
    ) -> Iterator[CellBatch]:
        """Yield the cells in order, `size` at a time (the last batch may be smaller).

        Parameters
        ----------
        size
            Cells of a batch.
        vocab
            Vocabulary whose ids the batches carry.
        label_keys
            For each role (`batch`, `cell_type`, ...) the obs column whose integer codes go into `labels`.
        rows
            Cells to read, in this order; all when None.
        start
            Cells of that sequence to leave out at its beginning: where an interrupted run goes on.
        """
        ...
