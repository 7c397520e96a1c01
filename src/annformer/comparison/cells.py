"""The cells of a comparison: what the methods get, what only the scores see, what the page says of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Int, Shaped
from scipy.sparse import csr_matrix, vstack

from annformer.data.anndata import AnnDataSource, reading_quietly
from annformer.data.tables import require_column
from annformer.errors import input_error
from annformer.evaluate.integration import UNLABELLED
from annformer.tokens import without_logarithm

MOST_SCORED = 30_000
"""Cells that are scored: distances between all of them are looked at, for every method and seed."""
MOST_DRAWN = 2_000
"""Cells on the maps: more are slow to draw and hide each other."""
FEWEST_DRAWN = 20
"""Cells of a type that are drawn even when it is rare."""
MOST_LEVELS = 56
"""Categories that a column may have to colour the maps."""
MOST_COLUMNS = 40
NOTHING = UNLABELLED[0]


def read_cells(
    path: str | Path, *, batch_key: str | None, label_key: str, layer: str | None = None, gene_key: str | None = None
) -> AnnData:
    """Read an h5ad file or zarr folder into memory, once it is clear that it holds what is needed."""
    with reading_quietly(), AnnDataSource(path, layer=layer, gene_key=gene_key) as source:
        labels_of(source, label_key)
        if batch_key is not None:
            batches_of(source, batch_key)
    return anndata.read_zarr(path) if Path(path).is_dir() else anndata.read_h5ad(path)


def batches_of(source: AnnDataSource, batch_key: str) -> Shaped[np.ndarray, "cell"]:
    """Batch of every cell as text.

    Raises
    ------
    InputError
        When there is no such column, a cell has no value in it, or all have the same.
    """
    codes = source.codes("batch", batch_key)
    names = np.asarray(source.categories["batch"], dtype=object)
    if len(names) < 2:
        found = f"obs[{batch_key!r}] has one value, {names[0]!r}, in all cells"
        remedy = "name another column with batch_key (--batch_key): one batch needs no integration, and none can be held out"
        raise input_error(found, "at least two batches", remedy)
    return names[codes]


def blind_cells(source: AnnDataSource, batch_key: str | None, *, undo: bool = False) -> AnnData:
    """Counts, gene names and, if there are some, batches: all that a method gets, so that none can look at a label.

    Parameters
    ----------
    undo
        Undo logarithms instead of refusing them.

    Raises
    ------
    InputError
        When the cells have logarithms only.
    """
    if source.log_base is not None and not undo:
        found = f"{source.name} holds no counts: {source.counts.where} holds logarithms"
        raise input_error(found, "the raw counts of every cell, in X or a layer", "put them into layers['counts'], or name their layer")
    blocks = [block for _, block in source.raw_blocks()]
    parts = [csr_matrix((block.data, block.indices, block.indptr), shape=(len(block.indptr) - 1, source.n_vars)) for block in blocks]
    counts = csr_matrix(vstack(parts, format="csr"), dtype=np.float32)
    if source.log_base is not None:
        counts.data = without_logarithm(counts.data, source.log_base).astype(np.float32)
    genes = np.flatnonzero(np.asarray(source.gene_names) != "")
    batches = {} if batch_key is None else {batch_key: pd.Categorical(batches_of(source, batch_key))}
    obs = pd.DataFrame(batches, index=np.asarray(source.obs_names).astype(str))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice: genes are added up, and the gene match says so
        return AnnData(counts[:, genes], obs=obs, var=pd.DataFrame(index=np.asarray(source.gene_names)[genes].astype(str)))


def labels_of(source: AnnDataSource, label_key: str) -> Shaped[np.ndarray, "cell"]:
    """Type of every cell as text, "unlabelled" where there is none.

    Raises
    ------
    InputError
        When there is no such column, or fewer than two types.
    """
    values = require_column(source.container.obs, label_key, where="obs", option="label_key")
    text = _as_text(values).to_numpy()
    kinds = sorted(set(text) - set(UNLABELLED))
    if len(kinds) < 2:
        found = f"obs[{label_key!r}] names {f'one type, {kinds[0]!r}' if kinds else 'no type at all'}"
        raise input_error(found, "at least two types of cells", "name another column with label_key (--label_key)")
    return text


def _as_text(values: pd.Series) -> pd.Series:
    return values.astype(object).where(values.notna(), NOTHING).astype(str)


def require_shared_types(labels: Shaped[np.ndarray, "cell"], batches: Shaped[np.ndarray, "cell"]) -> None:
    """Refuse cells on which nothing tells whether batches mix: no type has cells of several batches, or each cell has its own.

    Raises
    ------
    InputError
        When that is so.
    """
    if not share_types(labels, batches):
        found = "whether batches mix cannot be told: no type of cell occurs in two batches"
        raise input_error(found, "types that several batches share", "name other columns with --batch_key and --label_key")


def share_types(labels: Shaped[np.ndarray, "cell"], batches: Shaped[np.ndarray, "cell"]) -> bool:
    """Whether some type has cells of several batches, and not a batch for each."""
    known = ~np.isin(labels, UNLABELLED)
    counted = pd.crosstab(labels[known], batches[known])
    n_batches, n_cells = (counted > 0).sum(axis=1), counted.sum(axis=1)
    return bool(((n_batches > 1) & (n_batches < n_cells)).any())


def require_cells(batches: Shaped[np.ndarray, "cell"], batch_key: str, needed: Mapping[str, int]) -> None:
    """Refuse batches with fewer cells than some method needs (`needed`: method -> cells), before any method runs.

    Raises
    ------
    InputError
        When there are some.
    """
    least = max(needed.values())
    sizes = pd.Series(batches).value_counts()
    if len(small := sizes[sizes < least].sort_index()):
        who = ", ".join(name for name, fewest in needed.items() if fewest > small.min())
        listed = ", ".join(f"{name!r} {n}" for name, n in small.head(5).items())
        found = f"{len(small)} of {len(sizes)} batches of obs[{batch_key!r}] have very few cells: {listed}"
        remedy = f"leave these cells out, join batches that belong together, or leave {who} out of --methods"
        raise input_error(found, f"at least {least} cells in every batch", remedy)


def data_card(
    source: AnnDataSource,
    name: str,
    *,
    kept: Bool[np.ndarray, "cell"],
    label_key: str,
    batch_key: str | None,
    n_labels: int,
    lacking: str = "a representation by some method",
) -> dict[str, object]:
    """Say what the cells are; those that are not kept are without what is `lacking`."""
    counts = source.counts
    left_out = int((~kept).sum())
    reads = np.concatenate([np.diff(block.indptr) for _, block in source.raw_blocks()])
    return {
        "cells": name,
        "size": f"{source.n_obs:,} cells, {source.n_vars:,} genes",
        "expressed genes per cell": f"{np.median(reads):,.0f} (median)",
        "matrix used": f"{counts.where}: {counts.kind}{f'. {counts.note}' if counts.note else ''}",
        "batches": "none were named" if batch_key is None else f"{batch_key}: {len(source.categories['batch'])}",
        "types": f"{label_key}: {n_labels}",
        "left out": f"{left_out:,} cells without {lacking}" if left_out else "no cell",
    }


def scored_cells(
    labels: Shaped[np.ndarray, "cell"], batches: Shaped[np.ndarray, "cell"], kept: Bool[np.ndarray, "cell"], seed: int
) -> Bool[np.ndarray, "cell"]:
    """Which cells are scored: all that are kept, or, where they are very many, a random choice in which no type of any batch is missing."""
    strata = pd.factorize(pd.MultiIndex.from_arrays([labels, batches]))[0]
    scored = np.zeros(len(kept), dtype=bool)
    scored[drawn_cells(strata, kept, seed, MOST_SCORED)] = True
    return scored


def drawn_cells(
    labels: Sequence[str] | np.ndarray, kept: Bool[np.ndarray, "cell"], seed: int, most: int = MOST_DRAWN
) -> Int[np.ndarray, "drawn"]:
    """Cells for the maps, in order: all when they are few, else a random choice in which no type is missing."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(kept))
    place = pd.Series(np.asarray(labels)[rows]).groupby(np.asarray(labels)[rows]).cumcount().to_numpy()
    first = np.concatenate([np.flatnonzero(place < FEWEST_DRAWN), np.flatnonzero(place >= FEWEST_DRAWN)])
    return np.sort(rows[first[:most]])


def colours_of(obs: pd.DataFrame, label_key: str, batch_key: str | None) -> pd.DataFrame:
    """Columns that can colour a map; batch and type first."""
    named = [label_key] if batch_key is None else [batch_key, label_key]
    others = [name for name in obs if name not in named and _can_colour(obs[name])]
    columns = obs[list(dict.fromkeys([*named, *others]))[:MOST_COLUMNS]]
    return columns.assign(**{name: _as_text(obs[name]) for name in named})  # numbered batches are names, not amounts


def not_coloured(obs: pd.DataFrame, label_key: str, batch_key: str | None) -> dict[str, object]:
    """Say which columns the maps cannot be coloured by, and why; nothing where there are none."""
    shown, by_reason = set(colours_of(obs, label_key, batch_key)), dict[str, list[str]]()
    for name in obs:
        if name not in shown:
            by_reason.setdefault(_why_not(obs[name]), []).append(str(name))
    said = [f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''} ({why})" for why, names in by_reason.items()]
    return {"not among the colours": "; ".join(said)} if said else {}


def _why_not(column: pd.Series) -> str:
    """Why a column does not colour the maps."""
    if _can_colour(column):
        return f"more than {MOST_COLUMNS} columns"
    n = column.nunique()
    return f"more than {MOST_LEVELS} values" if n > MOST_LEVELS else "one value" if n else "no value"


def _can_colour(column: pd.Series) -> bool:
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return column.nunique() > 1
    return 1 < column.nunique() <= MOST_LEVELS


def fresh(cells: AnnData) -> AnnData:
    """The same cells in an object of their own, so that no method finds what another left; the counts are shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrays = {name: values.copy() for name, values in cells.obsm.items()}
        return AnnData(cells.X, obs=cells.obs.copy(), var=cells.var.copy(), obsm=arrays, uns=copy.deepcopy(dict(cells.uns)))
