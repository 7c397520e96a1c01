"""The CSV file that stands beside a file with cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from annformer.errors import input_error

if TYPE_CHECKING:
    import pandas as pd


def require_no_table(out: Path, *, overwrite: bool) -> Path:
    """Say where the table goes; refuse before any work when something is there."""
    path = out.with_suffix(".csv")
    if path.exists() and not overwrite:
        found = f"{path}, where the table goes, exists already"
        raise input_error(found, "a new file", "choose another name, or replace it with --overwrite")
    return path


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write it whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        table.to_csv(partial, index_label="cell")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
