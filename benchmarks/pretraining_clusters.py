"""How well cell types lie apart in a representation that saw no labels: the model, random networks, axes of the corpus, PCA, HVG (part of
pretraining.py)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData

import annformer as af
from annformer.baselines import pca_embedding
from annformer.data.random_cells import random_cells
from annformer.evaluate import clustering_scores
from annformer.model.profile import ExpressionProfile
from annformer.tokenizer import profile_of
from annformer.train.gene_init import principal_axes, start_profile_at
from pretraining_cells import LABEL_KEY, Corpus, interval, means_over, one_thread, read_cells, resampled_mean, verdict, whole

MODEL, RANDOM, AXES = "model", "random network", "PCA 128 of the corpus"
RESOLUTIONS = (0.25, 0.5, 1.0, 2.0)
FIXED = 1.0
"""The resolution of the main table; nothing is chosen by labels there."""
SCORES = ("nmi", "ari", "silhouette", "avg_bio")


def log_normalised(adata: AnnData) -> AnnData:
    """Counts per 10,000, log1p, genes in at least 3 cells."""
    cells = AnnData(adata.X.copy(), obs=adata.obs[[]], var=adata.var[[]])
    sc.pp.filter_genes(cells, min_cells=3)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def floors(adata: AnnData, *, seed: int) -> dict[str, np.ndarray]:
    """PCA of all genes unscaled, PCA of 2,000 scaled HVG, and the HVG themselves; log-normalised expression in each."""
    cells = log_normalised(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scanpy and pandas, on small sets
        sc.pp.highly_variable_genes(cells, n_top_genes=min(2_000, cells.n_vars))
    variable = cells[:, cells.var["highly_variable"]].copy()
    scaled = sc.pp.scale(variable.X.toarray(), max_value=10)
    return {
        "PCA 50, all genes": pca_embedding(cells.X, n_components=50, seed=seed),
        "PCA 50, 2,000 HVG scaled": pca_embedding(scaled, n_components=50, seed=seed),
        "2,000 HVG": variable.X.toarray(),
    }


def random_network(model: af.ScGPT, seed: int) -> af.ScGPT:
    """The same network with weights that saw nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return af.ScGPT(model.config, model.vocab).eval()


def corpus_axes(corpus: Corpus, *, seed: int) -> ExpressionProfile:
    """Principal axes of the cells of the pretraining: what a profile begins at, and a linear method that knows as much as the model."""
    vocab = corpus.model.vocab
    axes, mean = principal_axes(random_cells(corpus.store, vocab), corpus.rows, len(vocab), 128, seed=seed)
    profile = ExpressionProfile(len(vocab), 128)
    start_profile_at(profile, axes, mean)
    return profile


def representations(adata: AnnData, models: Mapping[str, af.ScGPT], axes: ExpressionProfile, *, seed: int) -> dict[str, np.ndarray]:
    """Name -> cells in rows."""
    one_thread()
    with torch.inference_mode():
        placed = axes(profile_of(whole(adata, models[MODEL]))).numpy()
    for name, network in models.items():
        af.embed(adata, network, key_added=name, progress=False)
    return {name: np.asarray(adata.obsm[name]) for name in models} | {AXES: placed} | floors(adata, seed=seed)


def score_set(adata: AnnData, models: Mapping[str, af.ScGPT], axes: ExpressionProfile, *, seed: int, seeds: Sequence[int]) -> pd.DataFrame:
    """A row per representation, resolution and seed of the clustering."""
    labels = adata.obs[LABEL_KEY].astype(str).to_numpy()
    found = representations(adata, models, axes, seed=seed)
    keep = ~np.any([np.isnan(values).any(axis=1) for values in found.values()], axis=0)
    rows = [
        clustering_scores(values[keep], labels[keep], resolution=resolution, seed=of).assign(
            representation=name, resolution=resolution, seed=of
        )
        for name, values in found.items()
        for resolution in RESOLUTIONS
        for of in (seeds if resolution == FIXED else seeds[:1])
    ]
    return pd.concat(rows, ignore_index=True).assign(cells=int(keep.sum()), types=len(np.unique(labels[keep])))


def pooled(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of a set and method: mean over seeds of the clustering, and over the random networks."""
    named = scores.assign(method=scores["representation"].str.replace(r" #\d+$", "", regex=True))
    return named.groupby(["set", "cells", "types", "method"], sort=False)[list(SCORES)].mean().reset_index()


def best_by_nmi(scores: pd.DataFrame) -> pd.DataFrame:
    """At the resolution with the highest NMI, for every set and representation: the labels choose, as in scIB."""
    once = scores[scores["seed"] == scores["seed"].min()].reset_index(drop=True)
    return once.loc[once.groupby(["set", "representation"], sort=False)["nmi"].idxmax()]


def summary(scores: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """AvgBIO of every set and method, the mean over sets with its interval, and the difference of the model to each method."""
    wide = pooled(scores).pivot_table("avg_bio", ["set", "cells", "types"], "method", sort=False).reset_index()
    methods = [name for name in wide.columns if name not in ("set", "cells", "types")]
    added = []
    for title, names in means_over(wide["set"]).items():
        some = wide[wide["set"].isin(names)]
        mean = {"set": title, "cells": some["cells"].sum(), "types": ""}
        against = {"set": title.replace("mean", "model less this", 1).removesuffix(" of sets"), "cells": "", "types": ""}
        for name in methods:
            mean[name] = _with_interval(dict(zip(some["set"], some[name], strict=True)), seed)[0]
            difference, low, high = _with_interval(dict(zip(some["set"], some[MODEL] - some[name], strict=True)), seed)
            against[name] = "" if name == MODEL else f"{difference} {verdict(low, high, even=0, less_is_better=False)}"
        added += [mean, against]
    return pd.concat([wide, pd.DataFrame(added)], ignore_index=True)


def _with_interval(values: dict[str, float], seed: int) -> tuple[str, float, float]:
    low, high = interval(resampled_mean({name: np.array(value) for name, value in values.items()}, seed=seed))
    return f"{np.mean(list(values.values())):.3f} ({low:.3f} to {high:.3f})", low, high


def tables(
    model: af.ScGPT, corpus: Corpus, sets: Mapping[str, Path], *, n_cells: int, n_random: int, seed: int
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables by name, and what to say under them."""
    models = {MODEL: model} | {f"{RANDOM} #{number}": random_network(model, seed + number) for number in range(n_random)}
    axes = corpus_axes(corpus, seed=seed)
    seeds = (seed, seed + 1, seed + 2)
    found = {}
    for name, path in sets.items():
        adata = read_cells(path, n_cells, seed=seed, labelled=True)
        found[name] = score_set(adata, models, axes, seed=seed, seeds=seeds).assign(set=name)
    scores = pd.concat(found.values(), ignore_index=True)
    at_one = scores[scores["resolution"] == FIXED]
    parts = pooled(at_one).groupby("method", sort=False)[list(SCORES)].mean().reset_index()
    notes = [
        f"AvgBIO = mean of NMI, ARI and (silhouette of the labels + 1) / 2, at most {n_cells} labelled cells a set. Clusters:"
        f" {scores['method'].iloc[0].partition(',')[0]} at resolution {FIXED:g} for all methods, mean of {len(seeds)} seeds; no label.",
        f"In the second table each method and set has the resolution of {RESOLUTIONS} with its highest NMI: the labels choose, as in scIB.",
        f"{AXES}: log-normalised cells on the principal axes of the {len(corpus.rows):,} cells of the pretraining.",
        f"Random network: mean of {n_random} draws of weights. Intervals: 95 %, bootstrap over the sources of the sets.",
    ]
    chosen = {"clusters": summary(at_one, seed=seed), "clusters_by_nmi": summary(best_by_nmi(scores), seed=seed)}
    return chosen | {"clusters_parts": parts, "clusters_all": scores}, notes
