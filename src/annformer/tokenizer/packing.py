"""Cells as packed tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from numpy import ndarray

from annformer.kernels import GOLDEN, jit, mix
from annformer.tokenizer.expressed import fill_expressed, quantile_edges, quantiles_of
from annformer.tokenizer.settings import TokenizerSettings, n_kept
from annformer.tokenizer.zeros import add_zeros
from annformer.tokens import CellBatch, Measured, Profile, TokenBatch

LIBRARY_SIZE = 1e4
"""Counts that every cell is scaled to before the logarithm."""
_SMALL = 256
"""Whole numbers below it are looked up."""


def tokenize(
    cells: CellBatch,
    settings: TokenizerSettings,
    *,
    cls_id: int,
    step: int = 0,
    panel: Int[ndarray, "panel"] | None = None,
    view: bool = False,
    profile: bool = False,
) -> TokenBatch:
    """Turn cells into packed tokens, all of them visible; the genes of a cell stand in the order of their ids.

    Bins are taken over all non-zero genes of a cell (of the panel, if there is one), before genes are drawn. A cell without any gene
    becomes a lone `<cls>`. Negative values, which data sources refuse, are binned like any other non-zero value.

    Parameters
    ----------
    cells
        With `settings.zeros`, the columns that `cells.measured` says are genes that were measured: nothing else can tell a zero from a gap.
    step
        Training step: another step draws ties and genes anew. Leave it alone where results should repeat.
    panel
        Ids of the genes that become tokens, if not all.
    view
        Also give the log-normalised expression of the panel; its library size is that of all genes of `cells`.
    profile
        Also give the log-normalised expression of all expressed genes of `cells`, of the panel or not.
    """
    expressed = profile_of(cells) if profile else None
    expression = None
    if panel is not None:
        expression = torch.from_numpy(panel_expression(cells, panel)) if view else None
        cells = cells.over(panel)
    counts, gene_ids, measured = _in_vocabulary_order(cells)
    starts, columns = counts.indptr.astype(np.int64), counts.indices.astype(np.int32, copy=False).view(np.uint32)
    n_expressed, n_zeros = n_kept(starts[1:] - starts[:-1], cells.n_measured if settings.zeros != 0 else 0, settings)
    offsets = np.zeros(len(starts), np.int64)
    np.cumsum(n_expressed + n_zeros + 1, out=offsets[1:])
    ids, values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
    gene_keys, cell_keys = _gene_keys(gene_ids), np.empty(len(n_expressed), np.uint64)
    quantiles = quantiles_of(settings.n_bins if settings.values == "bins" else 1)
    given = (starts, columns, counts.data, gene_ids, gene_keys, settings.seed, step, cls_id, settings.cls_value, quantiles)
    made = (offsets, n_expressed, ids, values, cell_keys)
    others = fill_expressed(np.arange(len(n_expressed)), np.empty((0, 0)), *given, *made)
    if len(others):
        fill_expressed(others, quantile_edges(starts, counts.data, settings.n_bins, others), *given, *made)
    if settings.zeros != 0:
        assert cls_id not in gene_ids, "the columns are genes: <cls> is never measured"
        add_zeros(starts, columns, *measured, gene_ids, gene_keys, cell_keys, n_zeros, offsets, ids, values)
    packed = torch.from_numpy(offsets)
    return TokenBatch(
        gene_ids=torch.from_numpy(ids),
        values=torch.from_numpy(values),
        flags=None,
        dose=None,
        offsets=packed,
        n_visible=packed.diff(),
        targets=None,
        modality=None,
        labels={name: torch.from_numpy(codes.astype(np.int64)) for name, codes in cells.labels.items()},
        cell=None,
        expression=expression,
        profile=expressed,
    )


def profile_of(cells: CellBatch) -> Profile:
    """log(1 + 10,000 x count / library size) of every expressed gene of every cell; logarithms are undone first."""
    counts, gene_ids, _ = _in_vocabulary_order(cells.in_counts())
    offsets = counts.indptr.astype(np.int64)
    ids, levels = _log_normalised(offsets, counts.indices, counts.data, gene_ids)
    return Profile(torch.from_numpy(ids), torch.from_numpy(levels), torch.from_numpy(offsets))


@jit
def _log_normalised(
    offsets: Int[ndarray, "cell+1"], columns: Int[ndarray, "entry"], values: Float[ndarray, "entry"], gene_ids: Int[ndarray, "gene"]
) -> tuple[Int[ndarray, "entry"], Float[ndarray, "entry"]]:
    """Ids of the genes and their levels. Most counts of a cell are one of few: each has its logarithm taken once."""
    ids, levels = np.empty(len(columns), np.int64), np.empty(len(columns), np.float32)
    known, level_of = np.full(_SMALL, -1, np.int64), np.empty(_SMALL, np.float32)
    for cell in range(len(offsets) - 1):
        size = 0.0
        for i in range(offsets[cell], offsets[cell + 1]):
            size += values[i]
        scale = LIBRARY_SIZE / size if size > 0 else 0.0
        for i in range(offsets[cell], offsets[cell + 1]):
            value = values[i]
            ids[i] = gene_ids[columns[i]]
            if 0 <= value < _SMALL and value == int(value):
                count = int(value)
                if known[count] != cell:
                    known[count], level_of[count] = cell, np.float32(np.log1p(value * scale))
                levels[i] = level_of[count]
            else:
                levels[i] = np.float32(np.log1p(value * scale))
    return ids, levels


def panel_expression(cells: CellBatch, panel: Int[ndarray, "panel"]) -> Float[ndarray, "cell panel"]:
    """log(1 + 10,000 x count / library size) of the genes of a panel, in its order; NaN where a gene was not measured.

    The library size is the sum over all columns of `cells`, which so should hold more than the panel.
    """
    size = np.asarray(cells.counts.sum(axis=1), np.float64).reshape(-1)
    scale = np.divide(LIBRARY_SIZE, size, out=np.zeros_like(size), where=size > 0)
    part = cells.over(panel)
    values = np.log1p(part.counts.toarray() * scale[:, None]).astype(np.float32)
    if part.measured is not None:
        values[~part.measured.genes[part.measured.study]] = np.nan
    expression = np.full((len(size), len(panel)), np.nan, np.float32)
    order = np.argsort(panel)
    expression[:, order[np.searchsorted(panel[order], part.gene_ids)]] = values
    return expression


def _in_vocabulary_order(cells: CellBatch) -> tuple[Any, Int[ndarray, "gene"], Measured]:
    gene_ids = np.asarray(cells.gene_ids, np.int64)
    measured = cells.measured or Measured(np.ones((1, len(gene_ids)), dtype=bool), np.zeros(len(cells.rows), np.int64))
    if np.all(gene_ids[1:] > gene_ids[:-1]):
        return cells.counts, gene_ids, measured
    order = np.argsort(gene_ids)
    counts = cells.counts.tocsc()[:, order].tocsr()  # both conversions are linear; sorting indices in rows is slower
    return counts, gene_ids[order], measured._replace(genes=measured.genes.take(order, axis=1))


@jit
def _gene_keys(gene_ids: Int[ndarray, "gene"]) -> UInt64[ndarray, "gene"]:
    keys = np.empty(len(gene_ids), np.uint64)
    for gene in range(len(gene_ids)):
        keys[gene] = mix(np.uint64(gene_ids[gene]) * GOLDEN)
    return keys
