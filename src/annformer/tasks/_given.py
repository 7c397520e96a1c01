"""The cells that a task is given, or some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from anndata import AnnData
from jaxtyping import Int

from annformer.data.anndata import AnnDataSource
from annformer.genes import GeneMatch
from annformer.scgpt import ScGPT
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab


class How(TypedDict):
    """How cells are embedded."""

    embedding: str | None
    """Name in obsm of an embedding to use; None: embed."""
    progress: bool | None
    """Show a progress bar; None: when stderr is a terminal."""


class Cells(NamedTuple):
    """Where cells come from, and how they are embedded."""

    data: AnnData | str | Path
    source: AnnDataSource
    """That reads `data`."""
    model: ScGPT
    embedding: str | None
    progress: bool | None


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
