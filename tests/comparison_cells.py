"""A comparison of planted methods on cells whose types are known, shared by the tests of its result, page and command."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from annformer.comparison import integrate
from annformer.comparison.methods import Made, Method

TYPES = ("B cell", "T cell", "monocyte")
N_CELLS = 180


def some_cells(tiny_adata: Callable[..., ad.AnnData], n_batches: int = 6) -> ad.AnnData:
    """Cells of three types in several batches, every fortieth without a type."""
    adata = tiny_adata(N_CELLS, seed=3)
    adata.obs["batch"] = pd.Categorical([f"batch {n % n_batches}" for n in range(N_CELLS)])
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("unknown")
    adata.obs.iloc[::40, adata.obs.columns.get_loc("cell_type")] = "unknown"
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel()
    return adata


def planted(types: np.ndarray, *, apart: float, noise: float = 1.0) -> Callable[[ad.AnnData, int], Made]:
    """A method that knows the types and puts them this far apart, whatever the cells are."""
    place = np.eye(len(TYPES))[pd.Categorical(types, categories=TYPES).codes]

    def make(cells: ad.AnnData, seed: int) -> Made:
        rng = np.random.default_rng(seed)
        steps = np.arange(5)
        losses = {
            "train/gep": 2.0 / (steps + 1),
            "validation/gep": 2.1 / (steps + 1),
            "train/norm": 9.0 * steps,
            "validation/dar": 0.5 / (steps + 1),
        }
        return Made(
            np.c_[apart * place, rng.normal(size=(cells.n_obs, 3)) * noise].astype(np.float32), pd.DataFrame({"step": steps} | losses)
        )

    return make


def floor(make: Callable[[ad.AnnData, int], Made]) -> Callable[[ad.AnnData, int], Made]:
    """The same method without losses and with another draw."""
    return lambda cells, seed: Made(make(cells, seed + 100).embedding)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Without UMAP, which compiles for ten seconds, and scib-metrics, which is imported for twenty: clusters by k-means."""
    inside = "annformer.evaluate._integration_cells"
    patch.setattr(integrate, "umap", lambda representation, **_: np.asarray(representation)[:, 2:4])
    patch.setattr(f"{inside}.find_spec", lambda _: None)
    patch.setattr(f"{inside}.kbet_accepted", lambda _, batch: np.ones(len(batch), dtype=bool))
    patch.setattr(f"{inside}.effective_number", lambda _, group: np.ones(len(group)))


def table_of(adata: ad.AnnData, ours: float, others: dict[str, float]) -> dict[str, Method]:
    """Methods that put the types `ours` and the others so far apart."""
    types = adata.obs["cell_type"].astype(str).to_numpy()
    methods = {integrate.TUNED: Method(integrate.TUNED, "ours", planted(types, apart=ours))}
    for name, apart in others.items():
        methods[name] = Method(name, "floor", floor(planted(types, apart=apart)), random=False)
    return methods
