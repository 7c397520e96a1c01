"""Cells in any order: straight from a store, or of any source that is held in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int

from annformer.data.source import CellSource
from annformer.data.store import StoreSource
from annformer.data.tables import unknown_name
from annformer.tokens import CellBatch, Measured
from annformer.vocab import GeneVocab

CELLS_PER_READ = 4096


class RandomCells(Protocol):
    """Expression of cells over the genes of one vocabulary, in any order."""

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        ...

    @property
    def lengths(self) -> Int[np.ndarray, "cell"]:
        """Expressed genes of the vocabulary, of every cell."""
        ...

    @property
    def n_measured(self) -> Int[np.ndarray, "cell"]:
        """Genes of the vocabulary that were measured, of every cell."""
        ...

    def rows(self, rows: Int[np.ndarray, "cell"], label_keys: Mapping[str, str] | None = None) -> CellBatch:
        """Read the given cells, in this order; `label_keys` says which column's codes go into `labels` under which role."""
        ...

    def names(self, rows: Int[np.ndarray, "cell"]) -> list[str]:
        """Names of cells, for messages."""
        ...

    def codes(self, column: str) -> Int[np.ndarray, "cell"]:
        """Integer codes of a label column, of every cell; refuses a column that does not exist."""
        ...

    def categories(self, column: str) -> tuple[str, ...]:
        """What the codes of a label column stand for."""
        ...


class StoreCells:
    """Cells of a store, read when they are asked for. Pickled it is little more than the path."""

    def __init__(self, source: StoreSource, vocab: GeneVocab) -> None:
        self.source = source
        self.vocab = source.vocab if vocab == source.vocab else vocab  # the store's own is told by identity, without comparing tokens

    def __getstate__(self) -> tuple[StoreSource, GeneVocab]:
        return self.source, self.vocab

    def __setstate__(self, state: tuple[StoreSource, GeneVocab]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return self.source.n_obs

    @cached_property
    def lengths(self) -> Int[np.ndarray, "cell"]:
        """Expressed genes of the vocabulary, of every cell; counted by going through the store once if it is not the store's own."""
        return self.source.lengths if self.vocab is self.source.vocab else self.source.lengths_over(self.vocab)

    @property
    def n_measured(self) -> Int[np.ndarray, "cell"]:
        """Genes of the vocabulary that the source of the cell measured, of every cell."""
        return self.source.n_measured_over(self.vocab)

    def rows(self, rows: Int[np.ndarray, "cell"], label_keys: Mapping[str, str] | None = None) -> CellBatch:
        """Read the given cells, in this order."""
        return self.source.rows(rows, vocab=self.vocab, label_keys=label_keys)

    def names(self, rows: Int[np.ndarray, "cell"]) -> list[str]:
        """File of each cell and row in it."""
        return self.source.names(rows)

    def codes(self, column: str) -> Int[np.ndarray, "cell"]:
        """Integer codes of a label column, of every cell."""
        return self.source.codes(column)

    def categories(self, column: str) -> tuple[str, ...]:
        """What the codes of a label column stand for."""
        return tuple(self.source.manifest.columns[column])


class MemoryCells:
    """Cells of any source, read into memory at once.

    Parameters
    ----------
    columns
        Label columns to read beside the expression; no other can be asked for later.
    """

    def __init__(self, source: CellSource, vocab: GeneVocab, columns: Sequence[str] = ()) -> None:
        parts = list(source.batches(CELLS_PER_READ, vocab=vocab, label_keys={column: column for column in columns}))
        counts = sp.csr_array(sp.vstack([part.counts for part in parts], format="csr"))
        counts.has_canonical_format = True
        self._cells = CellBatch(counts, parts[0].gene_ids, np.arange(counts.shape[0]), {}, _measured(parts), parts[0].base)
        self._names = np.asarray(source.obs_names)
        self._codes = {column: np.concatenate([part.labels[column] for part in parts]) for column in columns}
        named: Mapping[str, Sequence[str]] = getattr(source, "categories", {})  # sources need not name what their codes stand for
        self._categories = {column: tuple(named.get(column) or map(str, range(codes.max() + 1))) for column, codes in self._codes.items()}

    def with_codes(self, column: str, codes: Int[np.ndarray, "cell"], categories: Sequence[str]) -> MemoryCells:
        """Return the same cells with one more label column."""
        other = copy.copy(self)
        other._codes = {**self._codes, column: codes}
        other._categories = {**self._categories, column: tuple(categories)}
        return other

    def changed(self, change: Callable[[CellBatch], CellBatch]) -> MemoryCells:
        """Return the same cells after a change of their values."""
        other = copy.copy(self)
        other._cells = change(self._cells)
        return other

    def subset(self, rows: Int[np.ndarray, "cell"]) -> MemoryCells:
        """Return some of the cells, in this order."""
        part = copy.copy(self)
        part._cells = self._cells.take(rows)._replace(rows=np.arange(len(rows)))
        part._names = self._names[rows]
        part._codes = {column: codes[rows] for column, codes in self._codes.items()}
        return part

    @property
    def whole(self) -> CellBatch:
        """All cells without a copy."""
        return self._cells

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self._cells.rows)

    @property
    def lengths(self) -> Int[np.ndarray, "cell"]:
        """Expressed genes of the vocabulary, of every cell."""
        return np.diff(self._cells.counts.indptr)

    @property
    def n_measured(self) -> Int[np.ndarray, "cell"]:
        """Genes of the vocabulary that were measured, of every cell: all that the source has, unless it says otherwise."""
        return self._cells.n_measured

    def rows(self, rows: Int[np.ndarray, "cell"], label_keys: Mapping[str, str] | None = None) -> CellBatch:
        """Take the given cells, in this order."""
        labels = {role: self.codes(column)[rows] for role, column in (label_keys or {}).items()}
        return self._cells.take(rows)._replace(labels=labels)

    def names(self, rows: Int[np.ndarray, "cell"]) -> list[str]:
        """Names of cells."""
        return [str(self._names[row]) for row in rows]

    def codes(self, column: str) -> Int[np.ndarray, "cell"]:
        """Integer codes of a label column, of every cell."""
        return self._codes[column]

    def categories(self, column: str) -> tuple[str, ...]:
        """What the codes of a label column stand for."""
        return self._categories[column]


def _measured(parts: Sequence[CellBatch]) -> Measured | None:
    """Bring together what the batches of a source say of measured genes; a set of genes that several of them have stands there once."""
    if all(part.measured is None for part in parts):
        return None
    number: dict[bytes, int] = {}
    study = []
    for part in parts:
        genes, of_cell = part.measured or (np.ones((1, len(part.gene_ids)), dtype=bool), np.zeros(len(part.rows), np.int64))
        study.append(np.array([number.setdefault(row.tobytes(), len(number)) for row in genes])[of_cell])
    return Measured(np.array([np.frombuffer(row, dtype=bool) for row in number]), np.concatenate(study))


def random_cells(source: StoreSource | CellSource | MemoryCells, vocab: GeneVocab, columns: Sequence[str] = ()) -> RandomCells:
    """Make the cells of `source` readable in any order, with these label columns."""
    if isinstance(source, MemoryCells):
        return source
    if not isinstance(source, StoreSource):
        return MemoryCells(source, vocab, columns)
    for column in columns:
        if column not in source.manifest.columns:
            found = f"the store {source.path} has no label column {column!r}"
            raise unknown_name(found, column, list(source.manifest.columns), "one of", "the column")
    return StoreCells(source, vocab)
