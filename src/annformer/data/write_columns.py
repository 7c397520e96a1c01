"""A copy of an AnnData file with more columns in obs, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from anndata.io import write_elem

from annformer.data.formats import Container
from annformer.data.write import group_at, opened, settle, write_copy


def write_with_columns(
    source: Container, path_in: Path, path_out: Path, columns: pd.DataFrame, *, key: str, record: Mapping[str, Any]
) -> None:
    """Write the cells of `source`, read from `path_in`, to `path_out`, which must not exist.

    Parameters
    ----------
    columns
        A row for every cell; they take the place of columns that have their names.
    key, record
        What goes to `uns["annformer"][key]`; plain values that HDF5 can hold.
    """
    write_copy(source, path_in, path_out, None)
    with opened(path_out, "r+") as target:
        obs = target["obs"]
        for name in columns:
            if name in obs:
                del obs[name]
            write_elem(obs, name, columns[name].array if isinstance(columns[name].dtype, pd.CategoricalDtype) else columns[name].to_numpy())
        before = [str(name) for name in obs.attrs["column-order"]]
        obs.attrs["column-order"] = [*before, *(name for name in columns if name not in before)]
        records = group_at(target, "uns", "annformer")
        if key in records:
            del records[key]
        write_elem(records, key, dict(record))
    settle(path_out)
