"""What an AnnDataSource is, in plain values: for `inspect` and for reports."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from annformer.data.collapse import content_hashes
from annformer.data.counts import look, open_matrix
from annformer.data.tables import is_text
from annformer.errors import InputError

if TYPE_CHECKING:
    from annformer.data.anndata import AnnDataSource

BATCH_NAMES = re.compile(
    r"batch|donor|patient|individual|subject|sample|library|lane|channel|replicate|study|dataset|orig\.?ident|chemistry|assay", re.I
)
CELL_TYPE_NAMES = re.compile(r"cell.?type|celltype|annot|label|class|lineage|cluster|louvain|leiden|phenotype", re.I)


def describe(source: AnnDataSource, *, scan: bool) -> dict[str, Any]:
    """Say what `source` is.

    Returns
    -------
    `format`, `name`, `n_obs`, `n_vars`, `stored`, `dtype`, `nonzero_share`, `counts` (where, kind, note), `matrices` (a list with where,
    kind, note, stored, dtype, n_vars), `gene_key`, `gene_columns`, `first_genes`, `n_duplicate_var_names`, `n_duplicate_obs_names`,
    `obs_columns` (a list with name, dtype, n_categories, n_missing, looks_like), and with `scan` what `scan_cells` says.
    """
    reader, counts = source.reader, source.counts
    values = {
        "format": source.container.format,
        "name": source.name,
        "n_obs": source.n_obs,
        "n_vars": source.n_vars,
        "stored": reader.stored,
        "dtype": str(reader.dtype),
        "nonzero_share": _nonzero_share(source),
        "counts": {"where": counts.where, "kind": counts.kind, "note": counts.note},
        "matrices": [_describe_matrix(source, where) for where in source.container.matrices],
        "gene_key": source.gene_key,
        "gene_columns": list(source.gene_columns),
        "first_genes": [str(name) for name in source.gene_names[:5]],
        "n_duplicate_var_names": int(pd.Index(source.var.names).duplicated().sum()),
        "n_duplicate_obs_names": int(pd.Index(source.obs_names).duplicated().sum()),
        "obs_columns": [_describe_column(source, name) for name in source.container.obs.columns],
    }
    return values | scan_cells(source) if scan else values


def _nonzero_share(source: AnnDataSource) -> float:
    reader = source.reader
    if reader.stored == "dense":
        sample = reader.sample()
        return float(np.count_nonzero(sample) / max(1, sample.size))
    return reader.n_values / (reader.shape[0] * reader.shape[1])


def _describe_matrix(source: AnnDataSource, where: str) -> dict[str, Any]:
    try:
        reader = open_matrix(source.container, where)
    except InputError as error:  # a broken layer that is not used must not keep anyone from the rest
        return {"where": where, "kind": "unreadable", "note": str(error)}
    kind, note, _ = look(reader.sample())
    return {"where": where, "kind": kind, "note": note, "stored": reader.stored, "dtype": str(reader.dtype), "n_vars": reader.shape[1]}


def _describe_column(source: AnnDataSource, name: str) -> dict[str, Any]:
    column = source.container.obs.column(name)
    n_categories = int(column.nunique())
    groups = 2 <= n_categories <= max(2, min(1000, source.n_obs // 2)) and (is_text(column) or _is_whole(column))
    looks_like = ""
    if groups:
        looks_like = "cell_type" if CELL_TYPE_NAMES.search(name) else "batch" if BATCH_NAMES.search(name) else ""
    return {
        "name": name,
        "dtype": str(column.dtype),
        "n_categories": n_categories,
        "n_missing": int(column.isna().sum()),
        "looks_like": looks_like,
    }


def _is_whole(column: pd.Series) -> bool:
    # cluster numbers that went through R with gaps come as floats
    return column.dtype.kind in "iub" or (column.dtype.kind == "f" and bool((column.dropna() % 1 == 0).all()))


def scan_cells(source: AnnDataSource) -> dict[str, Any]:
    """Read every cell once.

    Returns
    -------
    `n_empty_cells` and `first_empty_cells`, `n_duplicate_cells` (cells whose expression equals that of an earlier cell) and
    `first_duplicate_cells`, `genes_per_cell` (median and largest), `total_per_cell` (median).
    """
    n_genes = np.zeros(source.n_obs, dtype=np.int32)
    totals = np.zeros(source.n_obs)
    hashes = np.zeros(source.n_obs, dtype=np.uint64)
    for start, cells in source.raw_blocks():
        rows = slice(start, start + len(cells.indptr) - 1)
        n_genes[rows] = np.diff(cells.indptr)
        totals[rows] = np.diff(np.concatenate([[0.0], np.cumsum(cells.data, dtype=np.float64)])[cells.indptr])
        hashes[rows] = content_hashes(cells)
    empty = np.flatnonzero(n_genes == 0)
    full = np.flatnonzero(n_genes)
    duplicates = full[pd.Index(hashes[full]).duplicated()]
    return {
        "n_empty_cells": len(empty),
        "first_empty_cells": [str(name) for name in source.obs_names[empty[:5]]],
        "n_duplicate_cells": len(duplicates),
        "first_duplicate_cells": [str(name) for name in source.obs_names[duplicates[:5]]],
        "genes_per_cell": {"median": float(np.median(n_genes)), "max": int(n_genes.max())},
        "total_per_cell": {"median": float(np.median(totals))},
    }
