"""Cells of files and of stores in a form that can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import pandas as pd
import scipy.sparse as sp

from annformer.data import AnnDataSource
from annformer.data.store import MANIFEST
from annformer.vocab import GeneVocab


def write_mtx(adata: ad.AnnData, folder: Path) -> None:
    from scipy.io import mmwrite

    folder.mkdir(parents=True)
    mmwrite(folder / "matrix.mtx", sp.coo_matrix(adata.X.T.astype(int)))
    pd.DataFrame({"id": adata.var_names, "name": adata.var_names}).to_csv(folder / "genes.tsv", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv", sep="\t", header=False, index=False)


def content(cells, vocab: GeneVocab) -> list[tuple[tuple[str, float], ...]]:
    """Every cell as its sorted (gene, count) pairs."""
    found = []
    for row in range(len(cells.rows)):
        begin, end = cells.counts.indptr[row : row + 2]
        names = [vocab.tokens[cells.gene_ids[column]] for column in cells.counts.indices[begin:end]]
        found.append(tuple(sorted(zip(names, cells.counts.data[begin:end].tolist(), strict=True))))
    return found


def cells_of(paths: list[Path], vocab: GeneVocab) -> list:
    return [cell for path in paths for batch in AnnDataSource(path).batches(64, vocab=vocab) for cell in content(batch, vocab)]


def hashes(store: Path) -> list[str]:
    return [shard["sha256"] for shard in json.loads((store / MANIFEST).read_text())["shards"]]
