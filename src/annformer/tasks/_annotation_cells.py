"""The cells of a reference: which have a type, what the linear parts read of them, in which fold each is held back."""

from __future__ import annotations

import logging
import warnings
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int, Shaped

from annformer.data.anndata import AnnDataSource
from annformer.data.random_cells import MemoryCells
from annformer.data.split import folds
from annformer.errors import AnnformerWarning, input_error
from annformer.evaluate.integration import UNLABELLED
from annformer.tasks._cells import FEWEST_GENES
from annformer.tasks._votes import UNASSIGNED
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

TYPE = "cell_type"
"""Column under which the codes of the types stand beside the cells in memory."""
NO_TYPE = (*UNLABELLED, UNASSIGNED, "")
"""What stands where a cell has no type."""
FEWEST_CELLS = 3
"""Cells that express a gene before anything is learned from it."""
KEPT_WHOLE = 100
"""Cells that a type keeps when cells are drawn."""


class Reference(NamedTuple):
    """Labelled cells in memory."""

    cells: MemoryCells
    codes: Int[np.ndarray, "cell"]
    types: tuple[str, ...]
    folds: Int[np.ndarray, "cell"]
    """Number of the fold in which each cell is held back."""
    rows: Int[np.ndarray, "cell"]
    """Where the cells stand in their source."""
    strata: Int[np.ndarray, "cell"] | None
    """Cells of like depth have the same number: a difference that is at hand where no batches are; None where there are batches."""


def read_reference(
    source: AnnDataSource,
    vocab: GeneVocab,
    *,
    label_key: str,
    batch_key: str | None,
    n_folds: int,
    seed: int,
    most_cells: int | None = None,
) -> Reference:
    """Read the cells that have a type, and say in which fold each is held back.

    Parameters
    ----------
    most_cells
        Where there are more of them, and more genes, so many are drawn: linear parts cost as the smaller of both numbers grows.

    Raises
    ------
    InputError
        When a column is missing or has gaps, there are fewer than two types, or the cells express hardly a gene that the model knows.
    """
    source.codes("label", label_key)  # before the cells are read, and under the names that the user knows
    columns = [label_key]
    if batch_key is not None:
        source.codes("batch", batch_key)
        columns.append(batch_key)
    say_if_logarithms(source)
    every = MemoryCells(source, vocab, columns).changed(CellBatch.in_counts)
    rows, codes, types, n_untyped = _typed(every, label_key)
    if most_cells is not None and min(len(rows), len(expressed_genes(every))) > most_cells:
        said = "%s of %s cells are learned from (most_cells in the recipe); types of few cells are kept whole"
        log.info(said, f"{most_cells:,}", f"{len(rows):,}")
        drawn = _drawn(codes, most_cells, seed)
        rows, codes = rows[drawn], codes[drawn]
    _warn_of_single_cells(types, codes)
    named, cells = tuple(map(str, types)), every.subset(rows)
    groups = None if batch_key is None else np.asarray(every.categories(batch_key), dtype=object)[cells.codes(batch_key)]
    if groups is not None and len(set(groups)) < 2:
        log.info("obs[%r] has one batch: cells are held back one by one", batch_key)
        groups = None
    fold = _fold_of(types[codes], groups, n_folds, seed)
    if groups is not None and not learnable(codes, fold).any():
        msg = f"every type has cells in one group of obs[{batch_key!r}] only: cells are held back one by one, not whole groups"
        warnings.warn(msg, AnnformerWarning, stacklevel=4)
        groups, fold = None, _fold_of(types[codes], None, n_folds, seed)
    strata = None if groups is not None else _by_depth(cells.whole, n_folds)
    left_out = f", {n_untyped:,} without a type left out" if n_untyped else ""
    log.info("%s cells of %d types%s", f"{len(codes):,}", len(named), left_out)
    require_enough(expressed_genes(cells))
    return Reference(cells.with_codes(TYPE, codes, named), codes, named, fold, rows, strata)


def _typed(
    cells: MemoryCells, label_key: str
) -> tuple[Int[np.ndarray, "typed"], Int[np.ndarray, "typed"], Shaped[np.ndarray, "type"], int]:
    """Rows of the cells that have a type and express a gene, codes of their types, the types; how many cells have none."""
    labels = np.asarray(cells.categories(label_key), dtype=object)[cells.codes(label_key)]
    typed = ~np.isin(labels, NO_TYPE)
    rows = np.flatnonzero(typed & (cells.lengths > 0))
    types, codes = np.unique(labels[rows].astype(str), return_inverse=True)
    if len(types) < 2:
        found = f"obs[{label_key!r}] names {f'one type, {str(types[0])!r}' if len(types) else 'no type at all'}"
        raise input_error(found, "at least two types of cells", "name another column with label_key (--label_key)")
    if len(types) > max(20, len(rows) // 2):
        found = f"obs[{label_key!r}] has {len(types):,} values for {len(rows):,} cells"
        raise input_error(found, "types that many cells share", "name another column with label_key (--label_key)")
    if len(types) == len(rows):
        found = f"each of the {len(types)} types in obs[{label_key!r}] has one cell"
        raise input_error(found, "a type with two cells at least: how well types are learned is told by cells held back", "give more cells")
    return rows, codes, types, int((~typed).sum())


def _warn_of_single_cells(types: Shaped[np.ndarray, "type"], codes: Int[np.ndarray, "cell"]) -> None:
    if len(alone := types[np.bincount(codes, minlength=len(types)) == 1]):
        listed = ", ".join(repr(str(name)) for name in alone[:5])
        one = len(alone) == 1
        msg = f"{len(alone)} {'type has one cell' if one else 'types have one cell each'} ({listed}): learned, but how well cannot be told"
        warnings.warn(msg, AnnformerWarning, stacklevel=5)


def _fold_of(labels: Shaped[np.ndarray, "cell"], groups: Shaped[np.ndarray, "cell"] | None, n: int, seed: int) -> Int[np.ndarray, "cell"]:
    """Number of the fold in which each cell is held back."""
    fold = np.empty(len(labels), np.int64)
    for number, part in enumerate(folds(labels, groups, n_folds=n, seed=seed)):
        fold[part.test] = number
    return fold


def _drawn(codes: Int[np.ndarray, "cell"], n: int, seed: int) -> Int[np.ndarray, "drawn"]:
    """Draw `n` cells, of every type its share but at least `KEPT_WHOLE`, or all that it has."""
    order = np.random.default_rng(seed).permutation(len(codes))
    place = np.empty(len(codes), np.int64)  # of each cell among those of its type
    for code in np.unique(codes):
        members = order[codes[order] == code]
        place[members] = np.arange(len(members))
    first = order[place[order] < KEPT_WHOLE]
    first = first[np.argsort(place[first], kind="stable")]  # with very many types: one cell of each before the second of any
    others = order[place[order] >= KEPT_WHOLE]
    return np.sort(np.concatenate([first, others])[:n])


def _by_depth(cells: CellBatch, n: int) -> Int[np.ndarray, "cell"]:
    """Part cells by their expressed genes: `n` parts of equal size."""
    rank = np.argsort(np.argsort(np.diff(cells.counts.indptr), kind="stable"), kind="stable")
    return rank * n // len(rank)


def say_if_logarithms(source: AnnDataSource) -> None:
    """Warn that the values of a source are logarithms, which are undone."""
    if (base := source.log_base) is not None:
        name = "natural logarithms" if base == np.e else f"logarithms to base {base:g}"
        msg = f"{source.name} holds no counts: {source.counts.where} is taken for {name} of 1 + x, which are undone; counts are better"
        warnings.warn(msg, AnnformerWarning, stacklevel=4)


def expressed_genes(cells: MemoryCells) -> Int[np.ndarray, "gene"]:
    """Ids of the genes that some cells express, ascending."""
    batch = cells.whole
    return np.sort(batch.gene_ids[np.bincount(batch.counts.indices, minlength=len(batch.gene_ids)) >= FEWEST_CELLS])


class Selected(NamedTuple):
    """Some genes of some cells, in the order that was asked for."""

    counts: sp.csr_matrix
    sizes: Float[np.ndarray, "cell"]
    """Sum of the counts of every cell over the genes that the reference measured; 1 where it has none."""
    missing: Int[np.ndarray, "missing"]
    """Places of genes that were not measured: their counts are 0."""

    def at(self, depth: float) -> sp.csr_matrix:
        """log(1 + depth x count / sum of counts)."""
        scale = np.repeat(depth / self.sizes, np.diff(self.counts.indptr))
        values = np.log1p(self.counts.data * scale).astype(np.float32)
        return sp.csr_matrix((values, self.counts.indices, self.counts.indptr), shape=self.counts.shape)


def select(cells: CellBatch, genes: Int[np.ndarray, "gene"], measured: Int[np.ndarray, "measured"]) -> Selected:
    """Take genes out of cells, and the sizes of the cells over the genes that the reference measured."""
    csc = sp.csc_matrix(cells.counts)
    known = np.isin(cells.gene_ids, measured).astype(np.float64)
    sizes = np.asarray(csc @ known).reshape(-1)
    order = np.argsort(cells.gene_ids)
    places = order[np.minimum(np.searchsorted(cells.gene_ids, genes, sorter=order), len(order) - 1)]
    there = cells.gene_ids[places] == genes
    part = csc[:, places[there]].tocsr()
    counts = sp.csr_matrix((part.data, np.flatnonzero(there)[part.indices], part.indptr), shape=(part.shape[0], len(genes)))
    return Selected(counts, np.where(sizes > 0, sizes, 1.0), np.flatnonzero(~there))


def learnable(codes: Int[np.ndarray, "cell"], parts: Int[np.ndarray, "cell"]) -> Bool[np.ndarray, "cell"]:
    """Whether the type of a cell is among the cells that are learned from when its part is held back."""
    table = np.zeros((int(codes.max()) + 1, int(parts.max()) + 1), np.int64)
    np.add.at(table, (codes, parts), 1)
    return table.sum(axis=1)[codes] > table[codes, parts]


def require_enough(genes: Int[np.ndarray, "gene"]) -> None:
    """Refuse a reference that expresses hardly anything that the model knows."""
    if len(genes) < FEWEST_GENES:
        found = f"{len(genes)} genes that the model knows and at least {FEWEST_CELLS} cells express"
        raise input_error(found, f"at least {FEWEST_GENES}", "give all genes that were measured; `annformer inspect` says how they match")
