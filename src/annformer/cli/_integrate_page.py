"""The page of an integration: maps before and after, losses, what was done with which cells and genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float

from annformer.baselines.integration import INTEGRATION
from annformer.comparison.cells import blind_cells, colours_of, drawn_cells, labels_of, not_coloured, scored_cells
from annformer.comparison.facts import INTEGRATION_PACKAGES, RECIPE_TITLE, as_yaml, gene_lines, model_facts, version_facts
from annformer.comparison.methods import threads_kept
from annformer.data.anndata import AnnDataSource
from annformer.evaluate.integration import DEFINITIONS, integration_scores
from annformer.report import Bullets, Code, Facts, Figure, Folded, Note, Page, Table, Text, line_panels, scatter_figure, umap
from annformer.tasks._finetune import loaded
from annformer.tasks.integration import BatchIntegrator

OURS, FLOOR = "annformer fine-tuned", "PCA HVG"
SHOWN_SCORES = ("overall", "avg_bio", "avg_batch", "nmi", "ari", "asw_label", "graph_connectivity", "asw_batch", "kbet", "ilisi")


@dataclass(frozen=True)
class Shown:
    """What the page is made of."""

    integrator: BatchIntegrator
    name: str
    command: str
    facts: Mapping[str, object]
    genes: Sequence[str]
    """The gene match in sentences."""
    embeddings: Mapping[str, Float[np.ndarray, "cell width"]]
    maps: Mapping[str, Float[np.ndarray, "drawn 2"]]
    columns: pd.DataFrame
    scores: pd.DataFrame | None
    """Of both embeddings, where the extra for it is installed."""

    @classmethod
    def of(cls, integrator: BatchIntegrator, adata: AnnData, *, label_key: str | None, name: str, command: str, seed: int) -> Self:
        """Compute what is shown beside the result: principal components of the same cells, maps, scores."""
        source = AnnDataSource(adata, gene_key=integrator.gene_key, layer=integrator.layer)
        batches = adata.obs[integrator.batch_key].astype(str).to_numpy()
        labels = None if label_key is None else labels_of(source, label_key)
        counts = blind_cells(source, integrator.batch_key).X
        ours = np.asarray(adata.obsm["X_annformer"])
        with threads_kept():
            embeddings = {OURS: ours, FLOOR: np.asarray(INTEGRATION[FLOOR](counts, batches, seed=seed))}
            known = np.isfinite(ours[:, 0])
            rows = drawn_cells(batches if labels is None else labels, known, seed)
            maps = {method: umap(embedding[rows], seed=seed) for method, embedding in embeddings.items()}
            scored = scored_cells(batches if labels is None else labels, batches, known, seed)
            scores = _scores(embeddings, labels, batches, scored, seed)
        label = label_key if label_key is not None else integrator.batch_key
        sizes = zip(*np.unique(batches, return_counts=True), strict=True)
        made, n_genes = integrator.model_.config.provenance, len(integrator.genes_)
        how = str(made["genes_chosen_by"])
        asked_for = cast("dict[str, int]", made["recipe"])["n_genes"]
        facts: dict[str, object] = {
            "cells": name,
            "size": f"{adata.n_obs:,} cells, {source.n_vars:,} genes",
            "matrix used": f"{source.counts.where}: {source.counts.kind}",
            "batches": f"{integrator.batch_key}: {', '.join(f'{batch} {n:,}' for batch, n in sizes)}",
            "genes read": how if n_genes < asked_for else f"{n_genes:,} that vary within the batches ({how})",
            "time": f"{integrator.seconds_:,.0f} s",
        }
        if scored.sum() < known.sum():
            facts["scored"] = f"{scored.sum():,} cells, drawn at random"
        genes = gene_lines(source, loaded(integrator.model))
        facts |= not_coloured(adata.obs, label, integrator.batch_key)
        columns = colours_of(adata.obs, label, integrator.batch_key).iloc[rows]
        return cls(integrator, name, command, facts, genes, embeddings, maps, columns, scores)


def write_page(shown: Shown, path: Path) -> None:
    """Put everything on one page."""
    integrator = shown.integrator
    page = Page(f"Integration of {shown.name} by {integrator.batch_key}", _summary(shown))
    page.add("Maps", _maps(shown))
    if shown.scores is not None:
        table = shown.scores[["method", *(name for name in SHOWN_SCORES if name in shown.scores)]].rename(
            columns=lambda c: c.replace("_", " ")
        )
        page.add(
            "Scores", Table(table, "More is better."), Facts({name: DEFINITIONS[name] for name in SHOWN_SCORES if name in shown.scores})
        )
    page.add(
        "Whether to trust it",
        Note(
            "This page shows the result beside principal components that were not integrated at all, which is not a hard test. "
            "The command annformer compare integrate, with the same options, says whether Harmony or scVI would have done as well here."
        ),
    )
    page.add("Training", _curves(integrator.history_))
    page.add("The cells", Facts(shown.facts))
    page.add("Genes", Bullets(shown.genes))
    model = model_facts(integrator.model_, "") | {"full card": "model/README.md"}
    made_by = integrator.model_.config.provenance["recipe"]
    assert isinstance(made_by, dict), "fit() writes it"
    page.add("The model", Facts(model), Folded(RECIPE_TITLE, as_yaml(made_by)))
    page.add("How to get this page again", Code(shown.command), Facts(version_facts(INTEGRATION_PACKAGES)))
    page.add("Using it", Text("Neighbours, clusters and maps of the integrated cells:"), Code(_USE))
    page.write(path)


def _scores(
    embeddings: Mapping[str, np.ndarray], labels: np.ndarray | None, batches: np.ndarray, known: np.ndarray, seed: int
) -> pd.DataFrame | None:
    if find_spec("scib_metrics") is None:
        return None
    rows = []
    for method, embedding in embeddings.items():
        row = integration_scores(embedding[known], None if labels is None else labels[known], batches[known], seed=seed)
        row.insert(0, "method", method)
        rows.append(row)
    return pd.concat(rows, ignore_index=True)


def _summary(shown: Shown) -> str:
    n = len(shown.integrator.batches_)
    return (
        f"{len(next(iter(shown.embeddings.values()))):,} cells of {n} batches in one embedding. Training saw batches and no label of types."
    )


def _maps(shown: Shown) -> Figure:
    columns = shown.columns
    hover = [f"{cell}: {', '.join(map(str, row))}" for cell, row in zip(columns.index, columns.iloc[:, :2].to_numpy(), strict=True)]
    caption = (
        "UMAPs of the same cells by both embeddings, with the same settings. Well integrated: batches overlap, types lie apart. Choose "
        "another column to colour by, point at a cell for its name. A UMAP bends distances: do not measure on it."
    )
    return scatter_figure(shown.maps, columns, colour_by=[str(name) for name in columns.columns[:2]], hover=hover, caption=caption)


def _curves(history: pd.DataFrame) -> Figure:
    names = dict.fromkeys(str(column).partition("/")[2] for column in history if str(column).startswith("validation/"))
    panels: dict[str, dict[str, Any]] = {}
    for name in names:
        lines: dict[str, Any] = {}
        for column, words in ((f"train/{name}", "learned from"), (f"validation/{name}", "held back")):
            some = history[["step", column]].dropna() if column in history else history.iloc[:0]
            if len(some):
                lines[words] = (some["step"].to_numpy(), some[column].to_numpy())
        panels[name.replace("_", " ")] = lines
    return line_panels(
        panels, x="step", y="loss", caption="Losses on the cells that are learned from, and on those held back to stop in time."
    )


_USE = """\
import scanpy as sc

adata = sc.read_h5ad("integrated.h5ad")
sc.pp.neighbors(adata, use_rep="X_annformer")
sc.tl.umap(adata)
sc.tl.leiden(adata, flavor="igraph", n_iterations=2)"""
