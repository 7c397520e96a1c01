"""Results of finished runs on disk, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData

from annformer.comparison.facts import installed
from annformer.tasks._recipe import Recipe

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
COLUMN: Final = "column "
RESULTS_FOLLOW: Final = (
    *("torch", "numpy", "scipy", "scikit-learn", "pandas", "anndata", "numba", "scanpy", "scikit-misc"),
    *("harmonypy", "scvi-tools", "celltypist"),
)
"""Packages another version of which may give other results."""


class Result(Protocol):
    """What a run returns."""

    def arrays(self) -> Arrays:
        """All of it, as arrays that need no pickle."""
        ...

    @classmethod
    def of_arrays(cls, arrays: Arrays) -> Self:
        """Take what `arrays` gave."""
        ...


AnyResult = TypeVar("AnyResult", bound=Result)


class Kept:
    """A folder of results, found again by what they depend on.

    A run of which something else was asked (other cells, model, recipe, seed), or that other code or packages made, stands under another
    name, and is not found; a file that is not whole counts as none.

    Parameters
    ----------
    folder
        Is made when the first result is kept; None: nothing is kept.
    job
        Plain JSON values that say what all results depend on.
    """

    def __init__(self, folder: str | Path | None, job: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self._job = dict(job)

    def get(self, kind: type[AnyResult], make: Callable[[], tuple[AnyResult, float, float]], **run: Any) -> tuple[AnyResult, float, float]:
        """Return what an earlier run left, or else make it and keep it: result, seconds, memory in MB.

        Parameters
        ----------
        run
            Plain JSON values that tell this run from others of the job.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{self._name(run)}.npz"
        if (found := _read(path)) is not None:
            log.info("kept from an earlier start")
            seconds, memory = found["cost"]
            return kind.of_arrays(found), float(seconds), float(memory)
        made, seconds, memory = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **made.arrays(), cost=np.array([seconds, memory]))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        shutil.rmtree(self.folder / self._name(run), ignore_errors=True)
        return made, seconds, memory

    def work(self, **run: Any) -> Path | None:
        """Return the folder in which a run may keep what it needs to go on after a kill; it goes when the run is finished."""
        return None if self.folder is None else self.folder / self._name(run)

    def _name(self, run: Mapping[str, Any]) -> str:
        asked = {**self._job, "versions": installed(RESULTS_FOLLOW), "annformer": _code(), **run}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """Hash of this package's code: its version says less."""
    folder = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


NOTHING_KEPT: Final = Kept(None, {})


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def digest(cells: AnnData, columns: Iterable[Any] = ()) -> str:
    """Hash of counts, gene names, `obs` and further columns, one value per cell each."""
    found = hashlib.sha256()
    for array in (cells.X.data, cells.X.indices, cells.X.indptr):
        found.update(np.ascontiguousarray(array).tobytes())
    obs = [cells.obs[name] for name in cells.obs]
    for values in (cells.var_names, *obs, *columns):
        found.update("\x00".join(map(str, np.asarray(values))).encode())
        found.update(b"\x01")
    return found.hexdigest()


def table_as_arrays(table: pd.DataFrame | None) -> Arrays:
    """Columns of a table of numbers, by name; nothing of none."""
    return {} if table is None else {f"{COLUMN}{name}": table[name].to_numpy() for name in table}


def table_of_arrays(arrays: Arrays) -> pd.DataFrame | None:
    """Take what `table_as_arrays` gave."""
    columns = {name.removeprefix(COLUMN): values for name, values in arrays.items() if name.startswith(COLUMN)}
    return pd.DataFrame(columns) if columns else None


def plain_options(recipes: type[Recipe], default: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an estimator as JSON values, its recipe spelt out; without those that change no result."""
    given = options.get("recipe", default)
    recipe = given if isinstance(given, recipes) else recipes.named(given)
    return {name: value for name, value in options.items() if name != "threads"} | {"recipe": recipe.model_dump(mode="json")}
