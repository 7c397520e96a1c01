"""Where a task writes its result in the user's AnnData: one key of obsm or columns of obs, one record in uns, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

from annformer.data.write import foreign_record
from annformer.data.write_columns import left_over
from annformer.errors import input_error


def check_key(key_added: str) -> None:
    """Refuse a name that files cannot hold."""
    if not key_added or "/" in key_added:  # HDF5 and zarr would make folders of it
        found = f"key_added={key_added!r}"
        raise input_error(found, "a name without '/'", "choose another key_added")


def check_target(adata: AnnData, *, copy: bool) -> None:
    """Refuse before any work what could not be written into `adata` after it."""
    if not isinstance(adata, AnnData):
        found = f"data of type {type(adata).__name__}"
        raise input_error(found, "an AnnData object", "read it with anndata.read_h5ad; files have embed_file and predict_file")
    if adata.isbacked and (adata.is_view or copy):
        found = "a view of a backed AnnData" if adata.is_view else "copy=True of a backed AnnData"
        raise input_error(
            found,
            "an AnnData that can be written to in memory",
            "pass adata.to_memory(), or use embed_file or predict_file",
        )
    if not isinstance(adata.uns.get("annformer", {}), Mapping):
        name = "your AnnData"
        raise foreign_record(name)


def put(adata: AnnData, key_added: str, result: np.ndarray | pd.DataFrame, record: dict[str, Any], *, copy: bool) -> AnnData:
    """Write `obsm[key_added]` and `uns["annformer"][key_added]` into `adata` or a copy of it, which is returned.

    A view that is written into becomes an object of its own: that is what was asked for, and needs no word.
    """
    target = adata.copy() if copy else adata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        target.obsm[key_added] = result
    target.uns["annformer"] = {**target.uns.get("annformer", {}), key_added: record}
    return target


def put_columns(adata: AnnData, key_added: str, columns: pd.DataFrame, record: dict[str, Any], *, copy: bool) -> AnnData:
    """Write `columns` into obs, and `uns["annformer"][key_added]`, of `adata` or a copy of it, which is returned.

    Columns that an earlier prediction with the same `key_added` has left, and this one does not write, are removed.
    """
    target = adata.copy() if copy else adata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        for left in left_over([str(name) for name in target.obs], columns, key_added, target.uns.get("annformer", {}).get(key_added)):
            del target.obs[left]
        for name in columns:
            target.obs[name] = columns[name].array
    target.uns["annformer"] = {**target.uns.get("annformer", {}), key_added: record}
    return target
