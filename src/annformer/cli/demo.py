"""`annformer demo`: the main job on real cells that ship inside a dependency."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from annformer.cli._place import require_free

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from annformer.data.anndata import AnnDataSource
    from annformer.datasets import Dataset
    from annformer.scgpt import ScGPT

log = logging.getLogger(__name__)

DATASET = "pbmc68k_reduced"
FILES = ("report.html", "embedded.h5ad", "metrics.csv")
PCA, SCALED, UNTRAINED = "PCA, 50 components", "PCA of scaled genes", "untrained network"
KEY = "X_annformer"
OTHER_KEYS = {PCA: "X_pca_of_raw", SCALED: "X_pca_of_scaled", UNTRAINED: "X_untrained"}
"""What the model is compared with -> its place in `obsm` of embedded.h5ad."""
SPLITS = (0, 1, 2, 3, 4)
HIDDEN_SHARE = 0.3


@dataclass
class Run:
    """What a demo run knows."""

    command: str
    seed: int
    data: Dataset
    adata: AnnData
    source: AnnDataSource
    model: ScGPT
    card: str
    """Text of the model card, "" where the model has none."""
    annotation: pd.DataFrame
    """Scores by representation, classifier and split."""
    clustering: pd.DataFrame
    """Scores by representation."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, str]:
        """Method -> its place in `obsm`; the model comes first, under its own name."""
        return {self.model.name: KEY, **OTHER_KEYS}


def command(*, out: str = "annformer-demo", model: str = "annformer-base", seed: int = 0, overwrite: bool = False) -> None:
    """Embed 700 real blood cells with the model that ships, and put maps, clusters and labels on one page beside PCA.

    Nothing is trained. The cells ship inside scanpy and the model inside annformer, so no network is needed. It takes less than a minute.

    Parameters
    ----------
    out
        Folder for the page (report.html), the embedded cells and the numbers.
    model
        Another model: its folder, a folder of scGPT's authors, the name of a checkpoint, or org/repository on the Hub.
    seed
        Decides splits, maps, and the weights of the untrained network.
    overwrite
        Replace the folder of an earlier demo.
    """
    from annformer import datasets
    from annformer.cli._demo_page import summary_lines

    folder = Path(out)
    command = f"annformer demo --out {out} --model {model} --seed {seed}"
    run = make(folder, datasets.load(DATASET), model, seed=seed, command=command, overwrite=overwrite)
    print("\n".join(summary_lines(run)))
    print(f"\nLook at {folder / 'report.html'} (also {', '.join(str(folder / name) for name in FILES[1:])})")


def make(folder: Path, adata: AnnData, model: str | Path, *, seed: int, command: str, overwrite: bool) -> Run:
    """Do everything on `adata`, which is the data set of the demo or a part of it, and fill `folder`, whole or not at all."""
    from annformer.checkpoints import write_folder
    from annformer.cli._demo_page import write_page
    from annformer.data.anndata import reading_quietly

    require_free(folder, FILES, "demo", overwrite=overwrite)
    with _one_thread(), reading_quietly():
        run = compute(adata, model, seed=seed, command=command)
        log.info("[5/5] writing the page and the results")

        def fill(fresh: Path) -> None:
            run.adata.write_h5ad(fresh / "embedded.h5ad")
            metrics(run).to_csv(fresh / "metrics.csv", index=False)
            write_page(run, fresh / "report.html")

        write_folder(folder, FILES, fill)
    return run


def compute(adata: AnnData, source: str | Path, *, seed: int, command: str) -> Run:
    """Embed, map, annotate, cluster."""
    from annformer.comparison.facts import card_text
    from annformer.data.anndata import AnnDataSource
    from annformer.datasets import DATASETS
    from annformer.evaluate import leave_out_annotation
    from annformer.scgpt import ScGPT

    data, seconds = DATASETS[DATASET], dict[str, float]()
    model, card = ScGPT.from_pretrained(source), card_text(source)
    with _step(1, f"embedding {adata.n_obs} cells with {model.name}, an untrained network, and PCA", seconds):
        represent(adata, model, seed)
    with _step(2, "neighbours and UMAP", seconds):
        draw_maps(adata, [KEY, *OTHER_KEYS.values()], seed)
    representations = {name: np.asarray(adata.obsm[key]) for name, key in {model.name: KEY, **OTHER_KEYS}.items()}
    labels = adata.obs[data.label_key].to_numpy()
    with _step(3, f"finding the labels of held-out cells, {len(SPLITS)} splits", seconds):
        annotation = leave_out_annotation(representations, labels, test_share=HIDDEN_SHARE, seeds=[seed + split for split in SPLITS])
    with _step(4, "clustering", seconds):
        clustering = _cluster(representations, labels, seed)
    return Run(command, seed, data, adata, AnnDataSource(adata), model, card, annotation, clustering, seconds)


def represent(adata: AnnData, model: ScGPT, seed: int) -> None:
    """Put the embedding, that of an untrained network of the same shape, and the principal components of the same cells into `obsm`."""
    from annformer.baselines import pca_embedding
    from annformer.tasks.embedding import embed

    embed(adata, model, key_added=KEY, progress=False)
    embed(adata, _untrained(model, seed), key_added=OTHER_KEYS[UNTRAINED], progress=False)
    adata.obsm[OTHER_KEYS[PCA]] = pca_embedding(adata.raw.X, n_components=50, seed=seed)
    adata.obsm[OTHER_KEYS[SCALED]] = pca_embedding(adata.X, n_components=50, seed=seed)


def _untrained(model: ScGPT, seed: int) -> ScGPT:
    import torch

    from annformer.scgpt import ScGPT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScGPT(model.config, model.vocab).eval()


def draw_maps(adata: AnnData, keys: list[str], seed: int) -> None:
    """Two-dimensional maps of all representations at `obsm[<key>_umap]`, with the same settings."""
    from annformer.report import umap

    for key in keys:
        adata.obsm[f"{key}_umap"] = umap(adata.obsm[key], seed=seed)


def metrics(run: Run) -> pd.DataFrame:
    """Every number of the page, one per row."""
    import pandas as pd

    annotation = run.annotation.melt(["representation", "classifier", "seed"], ["accuracy", "macro_f1"], var_name="measure")
    numbers = ["n_clusters", "nmi", "ari", "silhouette", "avg_bio"]
    clustering = run.clustering.rename(columns={"method": "classifier"}).melt(["representation", "classifier"], numbers, var_name="measure")
    parts = {"annotation": annotation, "clustering": clustering}
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
    log.info("[%d/5] %s", number, what)
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
