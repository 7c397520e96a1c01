"""Planted callers of types: they know the truth and are right in a share of the cells; shared by the tests of result, page and command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from annformer.comparison import annotate, methods
from annformer.comparison.annotation_methods import EXPRESSION, OURS
from annformer.comparison.calls import TYPE, Called, Caller
from annformer.evaluate import calibration

TYPES = ("B cell", "T cell", "monocyte")


def planted(truth: Mapping[str, str], share: float, *, says_all: bool = False) -> Callable[[ad.AnnData, ad.AnnData, int], Called]:
    """Right in `share` of the cells, else the next type; `says_all`: with confidence, novelty, sets and a part that is always right."""

    def call(reference: ad.AnnData, query: ad.AnnData, seed: int) -> Called:
        known = sorted(set(reference.obs[TYPE].astype(str)))
        rng = np.random.default_rng([seed, query.n_obs])
        right = np.array([truth[name] for name in query.obs_names], dtype=object)
        codes = np.array([known.index(name) if name in known else 0 for name in right])
        said = np.where(rng.random(query.n_obs) < share, codes, (codes + 1) % len(known))
        types = np.array(known, dtype=object)[said]
        if not says_all:
            return Called(types, np.full(query.n_obs, share))
        sets = pd.DataFrame(np.eye(len(known), dtype=bool)[said], columns=known)
        sets.iloc[0] = False
        novelty = (~np.isin(right, known)).astype(float)
        return Called(types, np.full(query.n_obs, share), novelty, sets, {EXPRESSION: right})

    return call


def table_of(cells: ad.AnnData, ours: float, floors: Mapping[str, float]) -> dict[str, Caller]:
    """Ours and floors that are right in such shares of the cells."""
    truth = dict(zip(cells.obs_names, cells.obs["cell_type"].astype(str), strict=True))
    table = {OURS: Caller(OURS, "ours", planted(truth, ours, says_all=True), random=True, embedded=True)}
    return table | {name: Caller(name, "floor", planted(truth, share)) for name, share in floors.items()}


class NoWatch:
    """Memory is not looked at: the garbage of a whole test session takes half a second to collect."""

    growth_mb = 0.0

    def __enter__(self) -> NoWatch:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def quick(patch: pytest.MonkeyPatch, *, embed: bool = False) -> None:
    """Without UMAP, which compiles for ten seconds, watch on memory and a thousand simulations; without the network unless asked for."""

    def some_embedding(cells: ad.AnnData, *_: object) -> float:
        cells.obsm["X_annformer"] = np.random.default_rng(0).normal(size=(cells.n_obs, 2))
        return 1.0

    patch.setattr(annotate, "umap", lambda representation, **_: np.asarray(representation)[:, :2])
    patch.setattr(methods, "MemoryWatch", NoWatch)
    patch.setattr(calibration, "calibrated_error", partial(calibration.calibrated_error, n_simulations=20))
    if not embed:
        patch.setattr(annotate, "embed_once", some_embedding)
