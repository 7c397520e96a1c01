"""AnnDataSource: cells of an AnnData object, h5ad, zarr, 10x h5 or mtx folder, read in order in bounded memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from scipy.sparse import csr_array

from annformer.data.collapse import Collapsed, Rows, bad_values, collapse, joined
from annformer.data.counts import choose
from annformer.data.formats import Container, open_container
from annformer.data.readers import read_rows
from annformer.data.tables import Table, as_text, is_text, require_column
from annformer.errors import AnnformerWarning, InputError, input_error
from annformer.genes import GeneMatch, match_genes
from annformer.tokens import CellBatch, without_logarithm
from annformer.vocab import GeneVocab

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


CELLS_LOOKED_AT = 512
"""Cells that tell to which base values are logarithms."""


class AnnDataSource:
    """Cells of one AnnData object or file; on disk only the rows in use are in memory.

    Parameters
    ----------
    data
        AnnData (also a view, or backed), or the path of an h5ad file, a zarr folder, a 10x `.h5` file, a 10x mtx folder or an
        mtx file with its two tables beside it; or a container that is open already.
        mtx folders, and (with a warning) the cells of a view of a backed AnnData, are read into memory whole.
    gene_key
        Column of var that holds the gene names or ids; None: the names of var.
    layer
        Layer to read ("X" and ".raw.X" are understood too); None: look for counts, see `counts`.
    orthologs
        Gene of the data -> gene of the vocabulary, for other species.
    min_match
        Refuse data of which a smaller share of the columns is known to the vocabulary.

    Attributes
    ----------
    counts
        Which matrix is read and what kind of data it holds.
    categories
        For every role in a `label_keys` that was used, the category that each code stands for.
    """

    def __init__(
        self,
        data: AnnData | str | Path | Container,
        *,
        gene_key: str | None = None,
        layer: str | None = None,
        orthologs: Mapping[str, str] | None = None,
        min_match: float = 0.1,
    ) -> None:
        self.container = open_container(data)
        self.gene_key = gene_key
        self.categories: dict[str, tuple[str, ...]] = {}
        self._orthologs, self._min_match = orthologs, min_match
        self._matches: dict[GeneVocab, GeneMatch] = {}
        self._warned_fractions = False
        with self.container.reading():
            _require_some(self.container)
        self.reader, self.counts = choose(self.container, layer)
        self.var: Table = self.container.matrices[self.counts.where].var
        self.gene_names: np.ndarray = self._read_gene_names()
        self._warn_doubles()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if there is one."""
        self.container.close()

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return self.reader.shape[0]

    @property
    def n_vars(self) -> int:
        """Number of columns of the matrix that is read."""
        return self.reader.shape[1]

    @property
    def obs_names(self) -> np.ndarray:
        """Name of every cell, in order."""
        return self.container.obs.names

    @property
    def name(self) -> str:
        """What to call the data in messages."""
        return self.container.name

    def match(self, vocab: GeneVocab) -> GeneMatch:
        """Find the columns in `vocab`.

        Raises
        ------
        InputError
            When less than `min_match` of the columns is found: with what the names look like, and whether another column of var, or
            the names of obs, would do.
        """
        if vocab not in self._matches:
            match = match_genes(self.gene_names, vocab, orthologs=self._orthologs)
            if match.share < self._min_match:
                self._refuse_transposed(match, vocab)
            match.require(min_share=self._min_match, other_columns={name: names.tolist() for name, names in self.gene_columns.items()})
            for line in match.report().lines():
                logger.info("%s", line)
            self._matches[vocab] = match
        return self._matches[vocab]

    @cached_property
    def gene_columns(self) -> dict[str, np.ndarray]:
        """Columns of var that hold text, by name, and the names of var as `var_names`, without the one in use."""
        columns = {"var_names": self.var.names} if self.gene_key else {}
        for name in self.var.columns:
            column = self.var.column(name)
            if name != self.gene_key and is_text(column):
                columns[name] = as_text(column)
        return columns

    @cached_property
    def log_base(self) -> float | None:
        """Base to which the values are logarithms of 1 + x; None: they are none.

        Of the usual ones, that which leads back to whole numbers; else that by which the sums of the first cells differ least from each
        other: they were equal before the logarithm.
        """
        if self.counts.kind != "log-normalised":
            return None
        with self.container.reading(self.counts.where):
            cells = self.reader.read(0, min(self.n_obs, CELLS_LOOKED_AT))
        cell = np.repeat(np.arange(len(cells.indptr) - 1), np.diff(cells.indptr))

        def spread(base: float) -> float:
            back = without_logarithm(cells.data, base)
            if (np.abs(back - np.rint(back)) <= 1e-4 * np.maximum(back, 1)).all():
                return 0.0
            sums = np.bincount(cell, back)
            return float(np.std(sums)) / max(float(np.mean(sums)), 1e-12)

        return min((np.e, 2.0), key=spread)

    def batches(
        self,
        size: int,
        *,
        vocab: GeneVocab,
        label_keys: Mapping[str, str] | None = None,
        rows: Int[np.ndarray, "cell"] | None = None,
        start: int = 0,
    ) -> Iterator[CellBatch]:
        """Yield the cells in order, `size` at a time, over the genes of `vocab` that the data have, in ascending id.

        Columns that mean the same gene are added up; if the values are logarithms, what lies behind them is.

        Parameters
        ----------
        size
            Cells of a batch; the last may be smaller.
        vocab
            Vocabulary whose ids the batches carry.
        label_keys
            For each role (`batch`, `cell_type`, ...) the obs column whose integer codes go into `labels`; see `categories`.
        rows
            Cells to read, in this order; all when None. Contiguous runs are fast.
        start
            Cells of that sequence to leave out at its beginning: where an interrupted run goes on.
        """
        assert size >= 1, "a batch has at least one cell"
        slots, gene_ids = _slots(self.match(vocab))
        labels = {role: self.codes(role, column) for role, column in (label_keys or {}).items()}
        wanted = np.arange(self.n_obs) if rows is None else np.asarray(rows, dtype=np.int64)
        wanted = wanted[start:]
        step = max(size, self.reader.rows_at_once // size * size)
        for first in range(0, len(wanted), step):
            block = wanted[first : first + step]
            at_once = self.reader.rows_at_once  # a batch may be larger than what is best read together
            cells = joined([self._read(block[at : at + at_once], slots, len(gene_ids)) for at in range(0, len(block), at_once)])
            for begin in range(0, len(block), size):
                part = block[begin : begin + size]
                counts = _cut(cells, begin, begin + len(part), len(gene_ids))
                yield CellBatch(counts, gene_ids, part, {role: codes[part] for role, codes in labels.items()}, base=self.log_base)

    def codes(self, role: str, column: str) -> Int[np.ndarray, "cell"]:
        """Integer codes of an obs column; what they stand for is then in `categories[role]`.

        Raises
        ------
        InputError
            When there is no such column, or a cell has no value in it; for a batch a blank is none (a type that is blank is no type).
        """
        option, what = ("column", "value") if role == column and role not in NAMED else (f"{role}_key", role)
        values = require_column(self.container.obs, column, where="obs", option=option)
        missing = np.flatnonzero(_blank(values) if role == "batch" else np.asarray(values.isna()))
        if len(missing):
            found = f"obs[{column!r}] has no value in {len(missing)} of {self.n_obs} cells (the first: {str(self.obs_names[missing[0]])!r})"
            raise input_error(
                found,
                f"a {what} for every cell",
                "fill the gaps, for example with 'unknown', or leave those cells out",
            )
        categorical = pd.Categorical(values).remove_unused_categories()
        self.categories[role] = tuple(as_text(categorical.categories))
        return np.asarray(categorical.codes, dtype=np.int64)

    def describe(self, *, scan: bool = False) -> dict[str, Any]:
        """Say what the data are, as plain values.

        Parameters
        ----------
        scan
            Also read every cell once, to count empty and duplicate ones.
        """
        from annformer.data.description import describe

        return describe(self, scan=scan)

    def raw_blocks(self) -> Iterator[tuple[int, Collapsed]]:
        """Yield all stored columns of the matrix, block by block, checked, with the number of the first row."""
        slots = np.arange(self.n_vars, dtype=np.int32)
        for start in range(0, self.n_obs, self.reader.rows_at_once):
            rows = np.arange(start, min(start + self.reader.rows_at_once, self.n_obs))
            yield start, self._read(rows, slots, self.n_vars)

    def _read(self, rows: Int[np.ndarray, "cell"], slots: Int[np.ndarray, "column"], n_slots: int) -> Collapsed:
        with self.container.reading(self.counts.where):
            stored = read_rows(self.reader, rows)
            cells = collapse(stored, slots, n_slots, logarithms=self.counts.kind == "log-normalised")
        if cells.first_bad >= 0:
            raise self._bad_values(stored, cells.first_bad, rows)
        if cells.fractions and self.counts.kind == "counts" and not self._warned_fractions:
            self._warned_fractions = True
            seen = f"{self.counts.where} was taken for counts, but cells {rows[0]} to {rows[-1]} hold fractions"
            msg = f"{self.name}: {seen}; they are used as they are"
            warnings.warn(msg, AnnformerWarning, stacklevel=3)
        return cells

    def _bad_values(self, stored: Rows, first: int, rows: Int[np.ndarray, "cell"]) -> InputError:
        kinds = {kind: int(mask.sum()) for kind, mask in bad_values(stored.data).items()}
        row = rows[int(np.searchsorted(stored.indptr, first, side="right")) - 1]
        gene = self.var.names[stored.indices[first]]
        counted = " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        where = f"{self.counts.where} of {self.name}"
        at = f"the first is {stored.data[first]} in cell {str(self.obs_names[row])!r}, gene {gene!r}"
        found = f"{where} has {counted} values in cells {rows.min()} to {rows.max()}; {at}"
        return input_error(
            found, "finite values that are not negative", "correct or remove these values, or read another layer with layer=..."
        )

    def _read_gene_names(self) -> np.ndarray:
        with self.container.reading("var"):
            if self.gene_key is None:
                names = self.var.names
            else:
                names = as_text(require_column(self.var, self.gene_key, where="var", option="gene_key"))
            return _without_other_features(names, self.var)

    def _refuse_transposed(self, match: GeneMatch, vocab: GeneVocab) -> None:
        turned = match_genes(as_text(self.obs_names[:5000]), vocab, orthologs=self._orthologs)
        if turned.share >= max(0.3, 2 * match.share):
            shares = f"{turned.share:.0%} of the obs names are genes, {match.share:.0%} of the {self.gene_key or 'var names'}"
            found = f"{self.name} seems to be transposed: {shares}"
            raise input_error(found, "cells in rows (obs), genes in columns (var)", "transpose it (adata.T) and save it again")

    def _warn_doubles(self) -> None:
        n_doubles = int(pd.Index(self.obs_names).duplicated().sum())
        if n_doubles:
            msg = f"{self.name}: {n_doubles} of {self.n_obs} cells have the name of another cell; cells are told apart by their position"
            warnings.warn(msg, AnnformerWarning, stacklevel=3)


NAMED = ("batch", "label", "cluster")
"""Roles of columns that users name by an option, `batch_key` and so on, whatever the column is called; other columns may be asked for by
their own names, which are no options."""


def _blank(values: pd.Series) -> Bool[np.ndarray, "cell"]:
    """Which values are missing, or text without a letter."""
    missing = np.asarray(values.isna())
    if not is_text(values):
        return missing
    codes, kinds = pd.factorize(values)  # few kinds stand for many cells
    return missing | np.array([*(not text.strip() for text in as_text(kinds)), True])[codes]


def _require_some(container: Container) -> None:
    for axis, table in (("cells", container.obs), ("genes", container.var)):
        if len(table.names) == 0:
            found = f"{container.name} has no {axis}"
            raise input_error(found, "at least one cell and one gene", "check how the data were filtered or written")


def _without_other_features(names: np.ndarray, var: Table) -> np.ndarray:
    """Leave the names of antibodies, peaks ... empty: an antibody named CD4 is not the gene CD4."""
    key = next((key for key in ("feature_types", "feature_type") if key in var.columns), None)
    if key is None:
        return names
    types = as_text(var.column(key))
    other = types != "Gene Expression"
    if not other.any() or other.all():
        return names
    kinds = ", ".join(f"{n} {kind!r}" for kind, n in zip(*np.unique(types[other].astype(str), return_counts=True), strict=True))
    logger.info("columns that are not gene expression are left out: %s", kinds)
    return np.where(other, "", names).astype(object)


def _slots(match: GeneMatch) -> tuple[Int[np.ndarray, "column"], Int[np.ndarray, "gene"]]:
    """For every column its place among the matched genes, which stand in ascending id."""
    known = match.ids >= 0
    gene_ids, place = np.unique(match.ids[known], return_inverse=True)
    slots = np.full(len(match.ids), -1, dtype=np.int32)
    slots[known] = place
    return slots, gene_ids.astype(np.int64)


def _cut(cells: Collapsed, begin: int, end: int, n_genes: int) -> csr_array:
    indptr = cells.indptr[begin : end + 1]
    first, last = indptr[0], indptr[-1]
    counts = csr_array((cells.data[first:last], cells.indices[first:last], indptr - first), shape=(end - begin, n_genes))
    counts.has_canonical_format = True
    return counts


@contextmanager
def reading_quietly() -> Iterator[None]:
    """The same cells are read several times; what is found out about them stands on the page."""
    reader = logging.getLogger("annformer.data")
    before = reader.level
    reader.setLevel(logging.WARNING)
    try:
        yield
    finally:
        reader.setLevel(before)
