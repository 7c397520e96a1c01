"""TileDB-SOMA experiments for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from annformer.data.census import CONFIG


def write_experiment(adata: ad.AnnData, folder: Path, layer: str = "raw") -> Path:
    """Write cells as an experiment with one layer."""
    import tiledbsoma.io

    tiledbsoma.io.from_anndata(str(folder), adata, measurement_name="RNA", X_layer_name=layer, context=_context())
    return folder


def write_in_collection(adata: ad.AnnData, folder: Path) -> Path:
    """Write cells as in a copy of the Census; return the experiment."""
    import tiledbsoma

    given: dict[str, Any] = {"context": _context()}
    with tiledbsoma.Collection.create(str(folder), **given) as whole:
        whole.add_new_collection("census_data")
    human = write_experiment(adata, folder / "census_data" / "homo_sapiens")
    with (
        tiledbsoma.Collection.open(str(human.parent), "w", **given) as data,
        tiledbsoma.Experiment.open(str(human), **given) as experiment,
    ):
        data.set("homo_sapiens", experiment, use_relative_uri=True)
    return human


def replace_obs(experiment: Path, obs: pd.DataFrame) -> None:
    """Give the cells of an experiment another table."""
    import tiledbsoma.io

    with tiledbsoma.Experiment.open(str(experiment), "w", context=_context()) as found:
        tiledbsoma.io.update_obs(found, obs, context=_context())


def _context() -> Any:
    """With our settings: by its own, TileDB may crash the process (`annformer.data.census.CONFIG`)."""
    import tiledbsoma

    return tiledbsoma.SOMATileDBContext(tiledb_config=CONFIG)
