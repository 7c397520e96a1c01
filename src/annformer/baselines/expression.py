"""Expression as the ordinary pipelines prepare it: log-normalised, highly variable genes, scaled."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Bool, Float

from annformer.errors import input_error

log = logging.getLogger(__name__)

Counts = sp.csr_array | sp.csr_matrix
"""Cells in rows."""
Names = Sequence[str] | np.ndarray | pd.Series
"""A name for each cell."""

TARGET_SUM = 1e4
FEWEST_VARYING = 10
CLIP = 10.0
"""Largest scaled value, as scanpy's tutorials and scib take it."""


class VariableGenes(NamedTuple):
    """Highly variable genes, and how they were found: `note` is empty for the ordinary way."""

    genes: Bool[np.ndarray, "gene"]
    note: str


def log_normalised(counts: Counts) -> sp.csr_matrix:
    """Scale every cell to 10,000 counts, then log(1 + x); a cell without counts stays zero."""
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    factor = TARGET_SUM / np.where(total > 0, total, 1.0)
    values = np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr)))
    return sp.csr_matrix((values.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)


def highly_variable(counts: Counts, batches: Names | None = None, n: int = 2_000) -> VariableGenes:
    """Choose genes that vary within the batches: scanpy's "seurat_v3", by its rank in each batch.

    Where its regression fails (few cells in a batch, few genes) or scikit-misc is missing, the genes are those of the flavour "seurat" on
    log values, by batch or, where that fails too, over all cells; the note says so.

    Parameters
    ----------
    n
        How many; all genes where there are no more.
    """
    n_genes = counts.shape[1]
    if n >= n_genes:
        return VariableGenes(np.ones(n_genes, dtype=bool), f"all {n_genes:,} genes: no more than {n:,} are measured")
    ways = [("seurat_v3", batches), ("seurat", batches), ("seurat", None)]
    failed: list[str] = []
    if find_spec("skmisc") is None:
        failed, ways = ["seurat_v3 needs scikit-misc, which is not installed"], ways[1:]
    for flavour, by in ways:
        try:
            genes = _scanpy(counts, by, n, flavour)
        except (ValueError, ArithmeticError) as error:
            failed.append(f"{flavour} failed: {str(error).splitlines()[0]}")
        else:
            note = f"flavour {flavour}{'' if by is batches else ' over all cells'} ({'; '.join(failed)})" if failed else ""
            if note:
                log.info("highly variable genes by %s", note)
            return VariableGenes(genes, note)
    found = f"no highly variable gene could be chosen ({'; '.join(failed)})"
    raise input_error(found, "cells whose genes vary", "check that the matrix holds counts of more than a few cells and genes")


def scaled(values: Counts) -> Float[np.ndarray, "cell gene"]:
    """Give every gene mean 0 and standard deviation 1, then clip at 10."""
    dense = values.toarray().astype(np.float32)
    dense -= dense.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = dense.std(axis=0, ddof=1, dtype=np.float64)
    dense /= np.where(spread > 0, spread, 1.0).astype(np.float32)
    return np.clip(dense, -CLIP, CLIP, out=dense)


def _scanpy(counts: Counts, batches: Names | None, n: int, flavour: str) -> Bool[np.ndarray, "gene"]:
    import anndata as ad
    import scanpy as sc

    exact = flavour == "seurat_v3"
    batch = np.zeros(counts.shape[0], dtype=str) if batches is None else np.asarray(batches, dtype=str)
    if exact:
        _check_varying(counts, batch)
    cells = ad.AnnData(sp.csr_matrix(counts if exact else log_normalised(counts)))
    cells.obs["batch"] = pd.Categorical(batch)
    unchecked = {"check_values": False} if exact else {}  # expected counts are not whole numbers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas' coming versions, and of genes without variance, which are not chosen
        by = None if batches is None else "batch"
        sc.pp.highly_variable_genes(cells, n_top_genes=n, flavor=flavour, batch_key=by, **unchecked)
    return cells.var["highly_variable"].to_numpy()


def _check_varying(counts: Counts, batch: np.ndarray) -> None:
    """The regression of scikit-misc takes the whole process down where there are no more than three points."""
    from sklearn.utils.sparsefuncs import mean_variance_axis

    for name in np.unique(batch):
        _, variance = mean_variance_axis(sp.csr_matrix(counts)[batch == name], axis=0)
        n_varying = int((variance > 0).sum())
        if n_varying < FEWEST_VARYING:
            msg = f"batch {name} has {n_varying} genes that vary"
            raise ValueError(msg)
