"""What is read of the cells of a reference and of a query, and whether the two can be compared."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Int

from annformer.data.anndata import AnnDataSource
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


def expressed(source: Chosen, vocab: GeneVocab) -> dict[str, int]:
    """Genes of the data that the model knows, with the number of cells that express them."""
    counts: Int[np.ndarray, "gene"] | None = None
    for cells in source.batches(CELLS_AT_ONCE, vocab=vocab):
        here = np.bincount(cells.counts.indices[cells.counts.data > 0], minlength=len(cells.gene_ids))
        counts, ids = here if counts is None else counts + here, cells.gene_ids
    assert counts is not None, "a source has cells"
    return {vocab.tokens[i]: int(n) for i, n in zip(ids, counts, strict=True)}


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
