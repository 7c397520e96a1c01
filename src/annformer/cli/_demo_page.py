"""What the demo shows: a few lines on the terminal and one page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from annformer.evaluate import summarise

if TYPE_CHECKING:
    from annformer.cli.demo import Run
    from annformer.report import Figure

SHOWN_COLUMNS = ("louvain", "phase", "n_genes", "n_counts", "percent_mito", "S_score", "G2M_score")
PACKAGES = ("annformer", "torch", "lightning", "scanpy", "anndata", "scikit-learn", "umap-learn", "numpy")


def summary_lines(run: Run) -> list[str]:
    """The result in a few lines."""
    tables = [annotation_table(run), clustering_table(run)]
    shown = [line for table in tables for line in ("", table.to_string(index=False, justify="right"))]
    return [*shown, "", *verdicts(run), error_sentence(run)]


def write_page(run: Run, path: Path) -> None:
    """Put everything on one page."""
    from annformer.report import Bullets, Code, Facts, Note, Page, Table, Text

    n, hidden = run.adata.n_obs, len(run.pretrained.validation_rows)
    page = Page("annformer demo: blood cells, embedded and annotated", _summary(run))
    page.add("What came out", *(Note(text) for text in (*verdicts(run), error_sentence(run))))
    page.add("Maps", maps(run))
    page.add("Labels of held-out cells", Text(_ANNOTATION), Table(annotation_table(run), _SPLITS))
    page.add("Agreement with the labels without learning any", Text(_CLUSTERING), Table(clustering_table(run)))
    page.add("Pretraining", Text(_pretraining(run)), curve(run), Facts(_model_facts(run)))
    page.add("Data", Facts(_data_facts(run)))
    page.add("What this does not show", Bullets(_caveats(n, hidden)))
    page.add("How to get this page again", Code(run.command), Facts(_version_facts(run)))
    page.write(path)


def annotation_table(run: Run) -> pd.DataFrame:
    """One row per classifier and method, `mean ± sd`."""
    means = summarise(run.annotation).sort_values("classifier", kind="stable")
    table = {"classifier": means["classifier"].to_list(), "method": means["representation"].to_list()}
    for measure, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        table[name] = [f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(means[measure], means[f"{measure}_sd"], strict=True)]
    return pd.DataFrame(table)


def clustering_table(run: Run) -> pd.DataFrame:
    """Methods in rows, scores in columns."""
    names = {"representation": "method", "nmi": "NMI", "ari": "ARI", "avg_bio": "AvgBIO", "method": "clusters by", "n_clusters": "clusters"}
    table = run.clustering.rename(columns=names)
    return table[["method", "NMI", "ARI", "silhouette", "AvgBIO", "clusters", "clusters by"]].round(3)


def maps(run: Run) -> Figure:
    """The two maps, coloured by any column."""
    from annformer.cli.demo import KEYS, OURS, PCA
    from annformer.report import scatter_figure

    obs = run.adata.obs
    columns = obs[[run.data.label_key, *(name for name in SHOWN_COLUMNS if name in obs)]].copy()
    held_out = np.isin(np.arange(len(obs)), run.pretrained.validation_rows)
    columns["used in pretraining"] = np.where(held_out, "held out", "trained on")
    panels = {f"{name}: UMAP": np.asarray(run.adata.obsm[f"{KEYS[name]}_umap"]) for name in (OURS, PCA)}
    hover = [f"{cell}: {label}" for cell, label in zip(obs.index, obs[run.data.label_key], strict=True)]
    return scatter_figure(panels, columns, hover=hover, caption=_MAPS)


def curve(run: Run) -> Figure:
    """Error during pretraining from the end of the first epoch on, with that of the gene means."""
    from annformer.report import line_figure

    history, mean = run.pretrained.history, run.pretrained.errors["gene mean"]
    validated = history["step"][history["validation/gep"].notna()].to_list()
    first, last = validated[1], validated[-1]
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for column, name, window in (("train/gep", "training cells", 25), ("validation/gep", "held-out cells", 1)):
        part = history.set_index("step")[column].dropna().rolling(window, min_periods=1, center=True).mean().loc[first:]
        lines[name] = (part.index.to_list(), part.to_list())
    lines["gene means, held-out cells"] = ([first, last], [mean, mean])
    return line_figure(lines, x="step", y="squared error of GEP (bins²)", caption=_CURVE)


def verdicts(run: Run) -> list[str]:
    """Say plainly which representation is better, for each classifier and without one."""
    from annformer.cli.demo import OURS, PCA, UNTRAINED

    said = []
    for classifier, rows in run.annotation[run.annotation.classifier != "majority class"].groupby("classifier", sort=False):
        f1 = rows.pivot(index="seed", columns="representation", values="macro_f1")
        said.append(f"Labels of held-out cells by {classifier}: {_compared(f1, OURS, PCA)}; {_compared(f1, OURS, UNTRAINED)}.")
    bio = run.clustering.set_index("representation")["avg_bio"]
    better, worse = (OURS, PCA) if bio[OURS] >= bio[PCA] else (PCA, OURS)
    scores = f"AvgBIO {bio[better]:.3f} against {bio[worse]:.3f}"
    said.append(f"Clusters and distances, without any labels: {better} is better than {worse} ({scores}).")
    return said


def error_sentence(run: Run) -> str:
    """Held-out error of predicted expression beside that of the gene means."""
    errors = run.pretrained.errors
    model, mean = errors["gep"], errors["gene mean"]
    verdict = (
        f"{1 - model / mean:.1%} lower" if model < mean else f"{model / mean - 1:.1%} HIGHER: the model has not learned more than the means"
    )
    return (
        f"Hidden expression values of {len(run.pretrained.validation_rows)} cells kept out of pretraining: "
        f"mean squared error {model:.1f} bins², against {mean:.1f} when each gene's mean is predicted ({verdict})."
    )


def _compared(scores: pd.DataFrame, ours: str, other: str) -> str:
    difference = scores[ours] - scores[other]
    better, worse = (ours, other) if difference.mean() >= 0 else (other, ours)
    wins = int(((difference if better == ours else -difference) > 0).sum())
    means = f"macro-F1 {scores[better].mean():.3f} against {scores[worse].mean():.3f}, better in {wins} of {len(scores)} splits"
    if 1 < wins < len(scores) - 1 or abs(difference.mean()) < difference.std(ddof=1) / 2:
        return f"no clear difference between {ours} and {other} ({means})"
    return f"{better} is better than {worse} ({means})"


def _summary(run: Run) -> str:
    model = run.pretrained.model
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_trained = run.adata.n_obs - len(run.pretrained.validation_rows)
    minutes = sum(run.seconds.values()) / 60
    return (
        f"A network of {n_parameters:,} parameters was pretrained on {n_trained} of {run.adata.n_obs} real blood cells without labels. "
        f"Then every cell was embedded, drawn and annotated. All of it took {minutes:.1f} minutes on this machine's processor. It shows "
        "how annformer works. It is not the pretrained model."
    )


def _pretraining(run: Run) -> str:
    config = run.recipe
    shares = ", ".join(f"{share:g}" for share in config.train.asked_shares)
    return (
        f"Each step takes {config.train.cells_per_step} cells and asks for the expression of a share ({shares}) of their genes, given the "
        "others. Asked genes see the visible genes and themselves. The losses: GEP (each asked gene from its own state) and "
        "GEPC (each asked gene from the cell embedding alone). No label takes part."
    )


def _model_facts(run: Run) -> dict[str, object]:
    model, train = run.pretrained.model, run.recipe.train
    sizes = model.config.model
    return {
        "network": f"{sizes.n_layers} layers, {sizes.width} wide, {sizes.n_heads} heads, vocabulary of {len(model.vocab.genes)} genes",
        "cells": f"{run.adata.n_obs - len(run.pretrained.validation_rows)} trained on, {len(run.pretrained.validation_rows)} held out",
        "steps": f"{int(run.pretrained.history['step'].max()) + 1} ({train.epochs} epochs), AdamW, rate up to {train.learning_rate:g}",
        "held-out error (bins²)": ", ".join(f"{name} {value:.1f}" for name, value in run.pretrained.errors.items()),
        "time": ", ".join(f"{what} {seconds:.0f} s" for what, seconds in run.seconds.items()),
        "fingerprint": model.fingerprint,
    }


def _data_facts(run: Run) -> dict[str, object]:
    from annformer.datasets import content_hash

    counts, match = run.source.counts, run.source.match(run.pretrained.model.vocab).report()
    return {
        "data set": run.data.title,
        "source": run.data.source,
        "licence": run.data.licence,
        "cells and genes": f"{run.adata.n_obs} cells, {run.adata.raw.n_vars} genes",
        "matrix used": f"{counts.where}: {counts.kind}. {counts.note}",
        "about": run.data.about,
        "labels": f"{run.data.label_key}: {run.adata.obs[run.data.label_key].nunique()} types",
        "genes matched": "; ".join(match.lines()),
        "SHA-256 of names and values": content_hash(run.adata),
    }


def _version_facts(run: Run) -> dict[str, object]:
    import platform

    import torch

    facts: dict[str, object] = {name: version(name) for name in PACKAGES}
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    return {"seed": run.recipe.train.seed, "machine": machine} | facts


def _caveats(n_cells: int, n_hidden: int) -> list[str]:
    return [
        f"The network is tiny and saw {n_cells - n_hidden} cells of one donor for about a minute. The same cells are then embedded, as PCA "
        "is computed on the cells it describes. Nothing here says how a model behaves that was pretrained on millions of cells.",
        "The labels were given by correlation with sorted reference populations: they are not the truth, some types overlap, and the "
        "rarest has 8 cells, so that macro-F1 moves with a handful of cells.",
        "The splits share cells: their standard deviation is not a confidence interval.",
        "Size, rate and length of the training were chosen among a dozen settings by the expression error on the very held-out cells that "
        "are reported, which flatters that error a little; the labels were not used to choose.",
        "The matrix holds log-normalised values of 765 variable genes. Bins are ranks within a cell, so they are those of the counts. But "
        "most non-zero counts are 1, and the order among equal values is drawn at random: that part of the error no model can remove.",
        "A UMAP bends distances: trust the tables, not the gaps.",
    ]


_MAPS = (
    "Each point is a cell; both maps are made with the same settings (15 neighbours). Point at a cell for its name, choose another column "
    "to colour by, click a label to hide it. Every label has its own pair of colour and shape, safe for colour-blind readers."
)
_ANNOTATION = (
    "30 % of the cells of every type were hidden; a classifier learned the labels of the others from their representation and named the "
    "hidden ones. The same cells are hidden from every method. kNN is a vote of the 10 nearest cells; strength and scaling of the logistic "
    "regression are chosen inside the learning cells. The untrained network has the same shape and random weights: what it reaches comes "
    "from the tokens, not from training."
)
_SPLITS = "Mean ± standard deviation over 5 splits; (none) is the most frequent label for every cell."
_CLUSTERING = (
    "NMI and ARI compare clusters with the labels; silhouette says how well the labels separate; AvgBIO is the mean of NMI, ARI and "
    "(silhouette + 1) / 2. Nothing was tuned to the labels."
)
_CURVE = (
    "Lower is better. The first epoch, in which the network finds the general level, is left out. The training curve is a moving mean over "
    "25 steps; the held-out cells are asked the same questions each time."
)
