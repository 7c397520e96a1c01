"""`annformer demo`: the main job on real cells that ship inside a dependency."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annformer.errors import input_error

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from annformer.data.anndata import AnnDataSource
    from annformer.datasets import Dataset
    from annformer.train.config import PretrainConfig
    from annformer.train.pretrain import Pretrained

log = logging.getLogger(__name__)

DATASET = "pbmc68k_reduced"
RECIPE: dict[str, Any] = {
    "model": {"width": 64, "n_heads": 2, "n_layers": 2, "ff_width": 64, "dropout": 0.0},
    "objectives": {"gep": {"kind": "gep"}, "gepc": {"kind": "gepc"}},
    "train": {"epochs": 20, "cells_per_step": 8, "learning_rate": 0.004},
}
"""What recipes/pretrain-tiny.yaml says; it stands here too because recipes are not installed."""
FILES = ("report.html", "embedded.h5ad", "metrics.csv", "training.csv", "model")
OURS, PCA, UNTRAINED = "annformer (tiny)", "PCA, 50 components", "untrained network"
KEYS = {OURS: "X_annformer", PCA: "X_pca_of_raw", UNTRAINED: "X_untrained"}
"""Method -> its place in `obsm` of embedded.h5ad."""
SPLITS = (0, 1, 2, 3, 4)
HIDDEN_SHARE = 0.3


@dataclass
class Run:
    """What a demo run knows; every step adds to it."""

    command: str
    recipe: PretrainConfig
    data: Dataset
    adata: AnnData
    source: AnnDataSource
    pretrained: Pretrained
    annotation: pd.DataFrame
    """Scores by representation, classifier and split."""
    clustering: pd.DataFrame
    """Scores by representation."""
    seconds: dict[str, float] = field(default_factory=dict)


def command(*, out: str = "annformer-demo", seed: int = 0, overwrite: bool = False) -> None:
    """Pretrain a tiny model on 700 real blood cells, embed them, find held-out labels, and put all on one page beside PCA.

    The cells ship inside scanpy, so no network is needed. It takes one to three minutes on two cores.

    Parameters
    ----------
    out
        Folder for the page (report.html), the embedded cells, the numbers and the model.
    seed
        Decides weights, splits, order and maps.
    overwrite
        Replace the folder of an earlier demo.
    """
    from annformer import datasets
    from annformer.cli._demo_page import summary_lines
    from annformer.train.config import PretrainConfig

    folder = Path(out)
    recipe = PretrainConfig.read(RECIPE | {"train": RECIPE["train"] | {"seed": seed}}, where="--seed")
    command = f"annformer demo --out {out} --seed {seed}"
    run = make(folder, datasets.load(DATASET), recipe, command=command, overwrite=overwrite)
    print("\n".join(summary_lines(run)))
    print(f"\nLook at {folder / 'report.html'} (also {', '.join(str(folder / name) for name in FILES[1:])})")


def make(folder: Path, adata: AnnData, recipe: PretrainConfig, *, command: str, overwrite: bool) -> Run:
    """Do everything on `adata`, which is the data set of the demo or a part of it, and fill `folder`, whole or not at all."""
    from annformer.checkpoints import write_folder
    from annformer.cli._demo_page import write_page

    _require_free(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".work", dir=folder.parent) as work:
        with _one_thread():
            run = compute(adata, recipe, Path(work), command=command)
        log.info("[6/6] writing the page and the results")

        def fill(fresh: Path) -> None:
            run.pretrained.model.save_pretrained(fresh / "model")
            run.adata.write_h5ad(fresh / "embedded.h5ad")
            metrics(run).to_csv(fresh / "metrics.csv", index=False)
            shutil.copy(Path(work) / "log.csv", fresh / "training.csv")
            write_page(run, fresh / "report.html")

        write_folder(folder, FILES, fill)
    return run


def compute(adata: AnnData, recipe: PretrainConfig, work: Path, *, command: str) -> Run:
    """Pretrain, embed, map, annotate, cluster."""
    from annformer.data.anndata import AnnDataSource
    from annformer.datasets import DATASETS
    from annformer.evaluate import leave_out_annotation
    from annformer.train.pretrain import new_model, pretrain
    from annformer.vocab import GeneVocab

    data, seed = DATASETS[DATASET], recipe.train.seed
    seconds: dict[str, float] = {}
    source = AnnDataSource(adata)
    vocab = GeneVocab(tuple(adata.raw.var_names)).with_specials()
    with _step(1, "pretraining a tiny model on the cells, without their labels", seconds):
        pretrained = pretrain(source, vocab, recipe, work, name="annformer-demo")
    with _step(2, "embedding the cells, and PCA of the same values", seconds):
        represent(adata, {OURS: pretrained.model, UNTRAINED: new_model(vocab, recipe)}, seed)
    with _step(3, "neighbours and UMAP", seconds):
        draw_maps(adata, seed)
    representations = {name: np.asarray(adata.obsm[key]) for name, key in KEYS.items()}
    labels = adata.obs[data.label_key].to_numpy()
    with _step(4, f"finding the labels of held-out cells, {len(SPLITS)} splits", seconds):
        annotation = leave_out_annotation(representations, labels, test_share=HIDDEN_SHARE, seeds=[seed + split for split in SPLITS])
    with _step(5, "clustering", seconds):
        clustering = _cluster(representations, labels, seed)
    return Run(command, recipe, data, adata, source, pretrained, annotation, clustering, seconds)


def represent(adata: AnnData, models: Mapping[str, Any], seed: int) -> None:
    """Put the embedding of every model, and the principal components of the same matrix, into `obsm`."""
    from annformer.baselines import pca_embedding
    from annformer.tasks.embedding import embed

    for name, model in models.items():
        embed(adata, model, key_added=KEYS[name], progress=False)
    adata.obsm[KEYS[PCA]] = pca_embedding(adata.raw.X, n_components=50, seed=seed)


def draw_maps(adata: AnnData, seed: int) -> None:
    """Two-dimensional maps of ours and of PCA at `obsm[<key>_umap]`, with the same settings."""
    import scanpy as sc

    for name in (OURS, PCA):
        copy = sc.AnnData(obsm={"X": adata.obsm[KEYS[name]]})
        sc.pp.neighbors(copy, n_neighbors=min(15, adata.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.umap(copy, random_state=seed)
        adata.obsm[f"{KEYS[name]}_umap"] = copy.obsm["X_umap"].astype(np.float32)


def metrics(run: Run) -> pd.DataFrame:
    """Every number of the page, one per row."""
    import pandas as pd

    annotation = run.annotation.melt(["representation", "classifier", "seed"], ["accuracy", "macro_f1"], var_name="measure")
    numbers = ["n_clusters", "nmi", "ari", "silhouette", "avg_bio"]
    clustering = run.clustering.rename(columns={"method": "classifier"}).melt(["representation", "classifier"], numbers, var_name="measure")
    errors = pd.DataFrame(
        {"representation": list(run.pretrained.errors), "measure": "squared error", "value": run.pretrained.errors.values()}
    )
    parts = {"annotation": annotation, "clustering": clustering, "held-out expression": errors}
    table = pd.concat([part.assign(task=task) for task, part in parts.items()])
    return table.rename(columns={"representation": "method", "classifier": "by"})[["task", "method", "by", "seed", "measure", "value"]]


def _cluster(representations: Mapping[str, np.ndarray], labels: np.ndarray, seed: int) -> pd.DataFrame:
    import pandas as pd

    from annformer.evaluate import clustering_scores

    rows = [clustering_scores(values, labels, seed=seed).assign(representation=name) for name, values in representations.items()]
    return pd.concat(rows, ignore_index=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the same digits on every number of cores, and no waiting for a core that is busy elsewhere."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _step(number: int, what: str, seconds: dict[str, float]) -> Iterator[None]:
    log.info("[%d/6] %s", number, what)
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began


def _require_free(folder: Path, *, overwrite: bool) -> None:
    """Say before the work begins that its result would have no place."""
    if not folder.exists():
        return
    if not folder.is_dir() or any(path.name not in FILES for path in folder.iterdir()):
        found = f"{folder} exists and is not the folder of an earlier demo"
        raise input_error(found, "a new folder", "give another --out")
    if any(folder.iterdir()) and not overwrite:
        found = f"{folder} holds an earlier demo"
        raise input_error(found, "a new folder", "add --overwrite, or give another --out")
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "no permission", str(folder))
