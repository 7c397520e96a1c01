"""Tables of cells and of genes, one column read at a time: a DataFrame in memory, or its group in an h5ad or zarr file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr

from annformer.errors import input_error


class Table(Protocol):
    """Names and columns of obs or var."""

    @property
    def names(self) -> np.ndarray:
        """The index, as text."""
        ...

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        ...

    def column(self, name: str) -> pd.Series:
        """Read one column."""
        ...


class FrameTable:
    """A DataFrame."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    @cached_property
    def names(self) -> np.ndarray:
        """The index, as text."""
        return as_text(self._frame.index)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(name) for name in self._frame.columns]

    def column(self, name: str) -> pd.Series:
        """Read one column."""
        return self._frame.iloc[:, self.columns.index(name)]


class GroupTable:
    """A data frame in an h5ad or zarr file."""

    def __init__(self, group: h5py.Group | zarr.Group) -> None:
        self._group: Any = group

    @cached_property
    def names(self) -> np.ndarray:
        """The index, as text."""
        name = str(self._group.attrs.get("_index", "_index"))
        if name not in self._group:
            found = f"{self._group.name} in the file has no index ({name!r})"
            raise input_error(found, "a table as AnnData writes it", "write the file again with AnnData")
        return as_text(anndata.io.read_elem(self._group[name]))

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(name) for name in self._group.attrs.get("column-order", ()) if str(name) in self._group]

    def column(self, name: str) -> pd.Series:
        """Read one column."""
        node = self._group[name]
        values = anndata.io.read_elem(node)
        if "categories" in node.attrs:  # AnnData before 0.8 keeps the categories elsewhere and a reference to them here
            categories = (
                self._group.file[node.attrs["categories"]] if isinstance(node, h5py.Dataset) else self._group[node.attrs["categories"]]
            )
            values = pd.Categorical.from_codes(values, pd.Index(as_text(anndata.io.read_elem(categories))))
        return pd.Series(values)


def table_of(node: Any, uns: Any = None) -> Table:
    """Table of an `obs` or `var` node; before AnnData 0.7 it is one compound array, its categories lie in `uns`."""
    if isinstance(node, h5py.Group | zarr.Group):
        return GroupTable(node)
    records = node[()]
    names = records.dtype.names or ()
    if not names:
        found = f"{node.name} in the file is not a table"
        raise input_error(found, "a table as AnnData writes it", "write the file again with AnnData")
    frame = pd.DataFrame({name: _decoded(records[name]) for name in names[1:]}, index=_decoded(records[names[0]]))
    for name in frame.columns:
        key = f"{name}_categories"
        if uns is not None and key in uns and frame[name].dtype.kind in "iu":
            frame[name] = pd.Categorical.from_codes(frame[name].to_numpy(), pd.Index(_decoded(np.atleast_1d(uns[key][()]))))
    return FrameTable(frame)


def _decoded(values: np.ndarray) -> np.ndarray:
    return as_text(values) if values.dtype.kind in "SO" else values


def as_text(values: Any) -> np.ndarray:
    """Text of every value, "" where there is none."""
    values = pd.Index(values) if not isinstance(values, pd.Index | pd.Series) else values
    missing = np.asarray(values.isna())
    plain = np.asarray(values, dtype=object)
    text = np.array([value.decode() if isinstance(value, bytes) else str(value) for value in plain], dtype=object)
    text[missing] = ""
    return text


def is_text(column: pd.Series) -> bool:
    """Whether a column holds names rather than numbers."""
    return isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(column.dtype) or column.dtype == object


def require_column(table: Table, name: str, *, where: str, option: str) -> pd.Series:
    """Read a column that the user named; when there is none, say what comes near.

    Parameters
    ----------
    table
        Table to read.
    name
        Column the user asked for.
    where
        What the table is called: `obs` or `var`.
    option
        The option with which the column was named.
    """
    if name in table.columns:
        return table.column(name)
    found = f"{where} has no column {name!r}"
    raise unknown_name(found, name, table.columns, f"one of the {where} columns", option)


def unknown_name(found: str, name: str, known: Sequence[str], expected: str, option: str) -> Exception:
    """Error for a name that does not exist, with the names that come near."""
    lower = {other.lower(): other for other in known}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
    listed = ", ".join(map(repr, known[:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    remedy = f"give {option}={near[0]!r}" + (f" (or {', '.join(map(repr, near[1:]))})" if near[1:] else "") if near else f"correct {option}"
    return input_error(found, f"{expected}: {listed or 'there are none'}", remedy)
