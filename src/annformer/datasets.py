"""Small public data sets by name, with source, hash and licence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from annformer.errors import input_error

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Dataset:
    """What is known about a data set before it is opened."""

    title: str
    source: str
    licence: str
    about: str
    """What its matrices and labels are, in two sentences."""
    label_key: str
    read: Callable[[], AnnData]


def load(name: str) -> AnnData:
    """Read a data set of `DATASETS`."""
    if name not in DATASETS:
        found = f"no data set {name!r}"
        raise input_error(found, f"one of {', '.join(DATASETS)}", "choose one of these names, or read your own file with anndata")
    return DATASETS[name].read()


def content_hash(adata: AnnData) -> str:
    """SHA-256 over names and values of the matrix that the data set was published for (`.raw` where there is one)."""
    table = adata.raw if adata.raw is not None else adata
    matrix = table.X.tocsr().astype("float32")
    digest = hashlib.sha256("\n".join([*adata.obs_names, *table.var_names]).encode())
    for part in (matrix.indptr.astype("int64"), matrix.indices.astype("int64"), matrix.data):
        digest.update(part.tobytes())
    return digest.hexdigest()


def _pbmc68k_reduced() -> AnnData:
    import scanpy as sc

    return sc.datasets.pbmc68k_reduced()


DATASETS = {
    "pbmc68k_reduced": Dataset(
        title="PBMC 68k, reduced (ships inside scanpy)",
        source="10x Genomics, fresh 68k PBMCs, donor A (Zheng et al., Nature Communications 2017), "
        "as reduced by the authors of scanpy: scanpy.datasets.pbmc68k_reduced()",
        licence="released to the public by 10x Genomics under its terms for data sets; this copy is part of scanpy (BSD-3-Clause)",
        about="X is scaled (negative values), so the counts-like matrix is .raw: log-normalised, 765 genes, no raw counts. "
        "The labels (bulk_labels) were given by correlation with profiles of sorted blood cells: a reference, not the truth.",
        label_key="bulk_labels",
        read=_pbmc68k_reduced,
    )
}
