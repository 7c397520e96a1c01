"""TileDB-SOMA experiments for tests, written by another process.

The process of TileDB 2.3 that has written experiments, as only tests do, has now and then crashed later, while reading; one that reads only
never did, in 1,600 openings. So reading is tested as users do it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

TRIES = 3


def write_experiment(adata: ad.AnnData, folder: Path, layer: str = "raw") -> Path:
    """Write cells as an experiment with one layer."""
    return _elsewhere(_write, adata, folder, layer)


def write_in_collection(adata: ad.AnnData, folder: Path) -> Path:
    """Write cells as in a copy of the Census; return the experiment."""
    return _elsewhere(_write_in_collection, adata, folder)


def replace_obs(experiment: Path, obs: pd.DataFrame) -> None:
    """Give the cells of an experiment another table."""
    _elsewhere(_replace_obs, experiment, obs)


@cache
def _writer() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _elsewhere(work: Callable[..., Any], *given: Any) -> Any:
    for left in reversed(range(TRIES)):
        try:
            return _writer().submit(work, *given).result()
        except BrokenProcessPool:
            _writer.cache_clear()
            if not left:
                raise
    raise AssertionError


def _write(adata: ad.AnnData, folder: Path, layer: str) -> Path:
    import tiledbsoma.io

    shutil.rmtree(folder, ignore_errors=True)  # what an earlier try left
    tiledbsoma.io.from_anndata(str(folder), adata, measurement_name="RNA", X_layer_name=layer)
    return folder


def _write_in_collection(adata: ad.AnnData, folder: Path) -> Path:
    import tiledbsoma

    shutil.rmtree(folder, ignore_errors=True)
    with tiledbsoma.Collection.create(str(folder)) as whole:
        whole.add_new_collection("census_data")
    human = _write(adata, folder / "census_data" / "homo_sapiens", "raw")
    with tiledbsoma.Collection.open(str(human.parent), "w") as data, tiledbsoma.Experiment.open(str(human)) as experiment:
        data.set("homo_sapiens", experiment, use_relative_uri=True)
    return human


def _replace_obs(experiment: Path, obs: pd.DataFrame) -> None:
    import tiledbsoma.io

    with tiledbsoma.Experiment.open(str(experiment), "w") as found:
        tiledbsoma.io.update_obs(found, obs)
