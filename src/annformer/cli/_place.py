"""Whether the folder of a result is free, asked before the work begins."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from annformer.errors import input_error


def require_free(folder: Path, files: Collection[str], what: str, *, overwrite: bool) -> None:
    """Say before the work begins that its result would have no place.

    Parameters
    ----------
    files
        What an earlier result consists of.
    what
        What an earlier result is called.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or any(path.name not in files for path in folder.iterdir()):
        found = f"{folder} exists and is not the folder of an earlier {what}"
        raise input_error(found, "a new folder", "give another --out")
    if any(folder.iterdir()) and not overwrite:
        found = f"{folder} holds an earlier {what}"
        raise input_error(found, "a new folder", "add --overwrite, or give another --out")
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "no permission", str(folder))
