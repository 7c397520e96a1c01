"""Whether cells can be learned from, and what a model reads of them: what the tasks that fine-tune share."""

from __future__ import annotations

import hashlib
import math
import warnings

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int

from annformer.baselines.expression import highly_variable
from annformer.data.anndata import AnnDataSource
from annformer.data.random_cells import MemoryCells
from annformer.errors import AnnformerWarning, input_error
from annformer.genes import GeneMatch
from annformer.scgpt import ScGPT
from annformer.tokenizer import panel_expression
from annformer.vocab import GeneVocab

FEWEST_GENES = 50
LEAST_SHARE, GOOD_SHARE = 0.5, 0.9
"""Of the genes that were learned from: below the first share new cells are refused, below the second a warning says so."""
CELLS_AT_ONCE = 1024


def require_counts(source: AnnDataSource) -> None:
    if source.counts.kind == "log-normalised":
        found = f"{source.name} holds no counts: {source.counts.where} holds logarithms"
        raise input_error(found, "the raw counts of every cell, in X or a layer", "put them into layers['counts'], or name their layer")


def chosen_genes(cells: MemoryCells, codes: Int[np.ndarray, "cell"], n: int) -> tuple[Int[np.ndarray, "panel"], str]:
    """Ids of the highly variable genes, ascending, and how they were chosen."""
    batch = cells.whole
    varying = highly_variable(sp.csr_matrix(batch.counts), codes.astype(str), n)
    counts = batch.counts[:, np.flatnonzero(varying.genes)]
    most, least = (np.asarray(extreme(axis=0).todense()).reshape(-1) for extreme in (counts.max, counts.min))
    n_varying = int((most > least).sum())
    if n_varying < FEWEST_GENES:
        found = f"{n_varying} variable genes that the model knows"
        raise input_error(found, f"at least {FEWEST_GENES}", "give all genes that were measured; `annformer inspect` says how they match")
    return np.sort(batch.gene_ids[varying.genes]), varying.note or "flavour seurat_v3"


def expression_over(cells: MemoryCells, panel: Int[np.ndarray, "panel"]) -> sp.csr_array:
    """Log-normalised expression of a panel of genes, of every cell."""
    blocks = np.array_split(np.arange(cells.n_obs), -(-cells.n_obs // CELLS_AT_ONCE))  # dense inside: a few cells at a time
    parts = [sp.csr_array(np.nan_to_num(panel_expression(cells.rows(rows), panel))) for rows in blocks]
    return sp.csr_array(sp.vstack(parts, format="csr"))


def reads_sizes(model: ScGPT) -> bool:
    """Whether its cell embedding reads expression relative to the sum over all genes of the cell."""
    return model.encoder.view is not None or model.encoder.profile is not None


def n_matched(source: AnnDataSource, vocab: GeneVocab) -> int:
    ids = source.match(vocab).ids
    return len(np.unique(ids[ids >= 0]))


def require_genes(genes: Int[np.ndarray, "gene"], match: GeneMatch, name: str, what: str) -> None:
    """Refuse new cells that lack most of the genes that were learned from, and warn of those that lack some.

    Parameters
    ----------
    what
        Which genes these are, for the message.
    """
    there = int(np.isin(genes, match.ids).sum())
    found = f"{name} has {there:,} of the {len(genes):,} genes {what}"
    if there < LEAST_SHARE * len(genes):
        remedy = "give all genes that were measured, or fit on cells with the same genes as these"
        raise input_error(found, f"at least {math.ceil(LEAST_SHARE * len(genes)):,} of them", remedy)
    if there < GOOD_SHARE * len(genes):
        warnings.warn(f"{found}; the others count as average", AnnformerWarning, stacklevel=5)


def digest(cells: MemoryCells, codes: Int[np.ndarray, "cell"]) -> str:
    counts = cells.whole.counts
    digest = hashlib.sha256(np.ascontiguousarray(codes).tobytes())
    for part in (cells.whole.gene_ids, counts.indptr, counts.indices, counts.data):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
