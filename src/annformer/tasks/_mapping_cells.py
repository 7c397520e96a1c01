"""What is read of the cells of a reference and of a query, and whether the two can be compared."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, UInt64

from annformer.data.anndata import AnnDataSource
from annformer.data.cell_keys import MIN_EXPRESSED, cell_keys, contains
from annformer.data.tables import as_text, require_column
from annformer.errors import AnnformerWarning, input_error
from annformer.evaluate.integration import UNLABELLED
from annformer.genes import GeneMatch
from annformer.tasks._given import Chosen
from annformer.tasks._votes import UNASSIGNED
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

CELLS_AT_ONCE = 4_096
MANY = 50
"""Labels from which on a column that has more of them than half its cells is taken for one of another kind."""
LEAST_GENES, MOST_GENES = 0.5, 0.8
"""Of what the reference expresses: below the first share a query is refused, below the second a warning says so."""


def labelled(source: AnnDataSource, label_key: str) -> tuple[Int[np.ndarray, "cell"], np.ndarray]:
    """Rows of the cells that have a label, and the labels.

    Raises
    ------
    InputError
        When there is no such column, no label in it, or a label of its own for nearly every cell.
    """
    values = require_column(source.container.obs, label_key, where="obs", option="label_key")
    text = as_text(values)
    rows = np.flatnonzero(~np.isin(text, ("", UNASSIGNED, *UNLABELLED)))
    labels = text[rows]
    if not len(rows):
        none = "'unlabelled' or 'unknown'"
        found = f"obs[{label_key!r}] of {source.name} holds no label: {len(text):,} cells have none, or {none}"
        raise input_error(found, "the type of the cells of the reference", "choose another column (label_key)")
    n_classes = len(pd.unique(labels))
    if n_classes > max(MANY, len(rows) // 2):
        found = f"obs[{label_key!r}] of {source.name} has {n_classes:,} labels for {len(rows):,} cells, such as {labels[0]!r}"
        raise input_error(found, "labels that many cells share", "choose another column (label_key)")
    if n_left := len(text) - len(rows):
        log.info("%s of %s cells have no label in obs[%r] and are left out", f"{n_left:,}", f"{len(text):,}", label_key)
    return rows, labels


class Looked(NamedTuple):
    """What the counts of cells say before they are embedded."""

    keys: UInt64[np.ndarray, "cell"]
    """Equal for cells whose counts are equal in every gene that the model knows; 0 where few are expressed: other cells may be alike."""
    n_expressing: int
    """Cells that express a gene that the model knows."""
    known: Bool[np.ndarray, "cell"]
    """Whether a cell is in the reference already."""
    genes: dict[str, int]
    """Genes of the data that the model knows, with the number of cells, of those that are not known, that express them."""

    @property
    def n_again(self) -> int:
        """New cells that are equal to one before them."""
        fresh = self.keys[~self.known & (self.keys != 0)]
        return len(fresh) - len(np.unique(fresh))


def looked_at(source: Chosen, vocab: GeneVocab, keys: UInt64[np.ndarray, "reference"]) -> Looked:
    """Go through the counts of cells once, and hold them against the keys of those in the reference."""
    in_reference, everywhere = np.unique(keys), np.zeros(len(vocab), np.int8)
    found, known, counts, n_expressing = [], [], None, 0
    for cells in source.batches(CELLS_AT_ONCE, vocab=vocab):
        key, expressed = (one[:, 0] for one in cell_keys(cells, everywhere))
        n_expressing += int(np.count_nonzero(expressed))
        key[expressed < MIN_EXPRESSED] = 0
        same = contains(in_reference, key) & (key != 0)
        found.append(key)
        known.append(same)
        here = np.bincount(cells.counts.indices[np.repeat(~same, np.diff(cells.counts.indptr))], minlength=len(cells.gene_ids))
        counts, ids = here if counts is None else counts + here, cells.gene_ids
    assert counts is not None, "a source has cells"
    genes = {vocab.tokens[i]: int(n) for i, n in zip(ids, counts, strict=True)}
    return Looked(np.concatenate(found), n_expressing, np.concatenate(known), genes)


def require_new(looked: Looked, name: str) -> None:
    """Refuse cells that are all in the reference already; say how many are, and how many occur twice among the new ones."""
    n_known, n = int(looked.known.sum()), looked.n_expressing
    if n and n_known == n:
        found = f"all {n:,} labelled cells of {name} are in the reference already, with the same counts in every gene"
        remedy = "add other cells, or use the reference as it is; to give these cells other labels, fit it again"
        raise input_error(found, "cells that are not in it: twice there they would vote twice", remedy)
    if n_known:
        log.warning("%s of %s labelled cells of %s are in the reference already and are left out", f"{n_known:,}", f"{n:,}", name)
    if looked.n_again:
        log.warning("%s cells of %s have the same counts as another cell there: each of them votes", f"{looked.n_again:,}", name)


def require_genes(genes: Mapping[str, int], match: GeneMatch, name: str) -> None:
    """Refuse a query that lacks most of what the reference expresses: the network would tell the studies apart, not the types."""
    here = {match.vocab.tokens[i] for i in match.ids[match.ids >= 0]}
    share = sum(n for gene, n in genes.items() if gene in here) / max(1, sum(genes.values()))
    n_there = len(here.intersection(genes))
    counted = f"{name} has {n_there:,} of the {len(genes):,} genes of the reference, {share:.0%} of what its cells express"
    if share < LEAST_GENES:
        remedy = "give all genes that were measured, or map onto a reference of the same genes"
        raise input_error(counted, f"genes that make up at least {LEAST_GENES:.0%} of it", remedy)
    if share < MOST_GENES:
        msg = f"{counted}: embeddings of query and reference differ by that too"
        warnings.warn(msg, AnnformerWarning, stacklevel=4)
