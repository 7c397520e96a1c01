"""A copy of an AnnData file with more columns in obs, in bounded memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from anndata.io import read_elem, write_elem

from annformer.data.formats import Container
from annformer.data.write import group_at, opened, settle, write_copy

ALWAYS = {"annotation": ("", "_confidence", "_novelty", "_set"), "mapping": ("", "_share", "_distance", "_novelty")}
"""Task -> what stands behind the key in the names of the columns that it always writes."""
SOMETIMES = {"annotation": ("_by_expression", "_by_network", "_majority"), "mapping": ()}
"""Likewise, of columns that it writes when asked to."""


def left_over(there: Collection[str], written: pd.DataFrame, key: str, record: Any) -> list[str]:
    """Columns of an earlier prediction under `key` that a new one does not write: they would tell of the earlier one.

    Parameters
    ----------
    there
        Names of all columns.
    record
        What stands in uns for the key. Where the record got lost, as it does when cells are joined, an earlier prediction is known by all
        the columns that it always writes; a column of the user's own that happens to begin with the key is left alone.
    """
    recorded = record.get("task") if isinstance(record, Mapping) else None
    tasks = [
        task for task, ends in ALWAYS.items() if task == recorded or (recorded is None and set(there).issuperset(key + end for end in ends))
    ]
    possible = {key + end for task in tasks for end in (*ALWAYS[task], *SOMETIMES[task])}
    return [name for name in there if name in possible and name not in written]


def write_with_columns(
    source: Container, path_in: Path, path_out: Path, columns: pd.DataFrame, *, key: str, record: Mapping[str, Any]
) -> None:
    """Write the cells of `source`, read from `path_in`, to `path_out`, which must not exist.

    Parameters
    ----------
    columns
        A row for every cell; they take the place of columns that have their names, and of those that an earlier prediction left.
    key, record
        What goes to `uns["annformer"][key]`; plain values that HDF5 can hold.
    """
    write_copy(source, path_in, path_out, None)
    with opened(path_out, "r+") as target:
        obs, records = target["obs"], group_at(target, "uns", "annformer")
        before = [str(name) for name in obs.attrs["column-order"]]
        old = set(left_over(before, columns, key, read_elem(records[key]) if key in records else None))
        for name in (*old, *columns):
            if name in obs:
                del obs[name]
        for name in columns:
            write_elem(obs, name, columns[name].array if isinstance(columns[name].dtype, pd.CategoricalDtype) else columns[name].to_numpy())
        kept = [name for name in before if name not in old]
        obs.attrs["column-order"] = [*kept, *(name for name in columns if name not in kept)]
        if key in records:
            del records[key]
        write_elem(records, key, dict(record))
    settle(path_out)
