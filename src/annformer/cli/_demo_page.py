"""What the demo shows: a few lines on the terminal and one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from annformer.evaluate import summarise

if TYPE_CHECKING:
    from annformer.cli.demo import Run
    from annformer.report import Figure

SHOWN_COLUMNS = ("louvain", "phase", "n_genes", "n_counts", "percent_mito", "S_score", "G2M_score")
PACKAGES = ("annformer", "torch", "scanpy", "anndata", "scikit-learn", "umap-learn", "numpy")
SAME = 0.01
"""Differences of AvgBIO below this are not called any: one other seed of the clustering makes as much."""

Verdict = Literal["better", "worse", "no clear difference"]


def summary_lines(run: Run) -> list[str]:
    """The result in a few lines."""
    tables = [annotation_table(run), clustering_table(run)]
    shown = [line for table in tables for line in ("", table.to_string(index=False, justify="right"))]
    return [*shown, _clusters_by(run), "", *verdicts(run), genes_sentence(run)]


def write_page(run: Run, path: Path) -> None:
    """Put everything on one page."""
    from annformer.comparison.facts import card_says, model_facts, version_facts
    from annformer.report import Bullets, Code, Facts, Note, Page, Table, Text

    page = Page(f"annformer demo: blood cells, embedded by {run.model.name}", _summary(run))
    page.add("What came out", *(Note(text) for text in (*verdicts(run), genes_sentence(run))))
    page.add("Maps", maps(run))
    page.add("Labels of held-out cells", Text(_ANNOTATION), Table(annotation_table(run), _SPLITS))
    page.add("Agreement with the labels without learning any", Text(_CLUSTERING), Table(clustering_table(run), _clusters_by(run)))
    page.add("The model", *[Text(text) for text in [card_says(run.card)] if text], Facts(model_facts(run.model, run.card)))
    page.add("The cells", Facts(_data_facts(run)))
    page.add("What this does not show", Bullets(_caveats(run)))
    page.add("How to get this page again", Code(run.command), Facts(version_facts(PACKAGES, seed=run.seed)))
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
    names = {"representation": "method", "nmi": "NMI", "ari": "ARI", "avg_bio": "AvgBIO", "n_clusters": "clusters"}
    table = run.clustering.drop(columns="method").rename(columns=names)
    return table[["method", "NMI", "ARI", "silhouette", "AvgBIO", "clusters"]].round(3)


def _clusters_by(run: Run) -> str:
    return f"Clusters by {run.clustering['method'].iloc[0]}."


def maps(run: Run) -> Figure:
    """The maps of all methods, coloured by any column."""
    from annformer.report import scatter_figure

    obs = run.adata.obs
    columns = obs[[run.data.label_key, *(name for name in SHOWN_COLUMNS if name in obs)]]
    panels = {name: np.asarray(run.adata.obsm[f"{key}_umap"]) for name, key in run.keys.items()}
    hover = [f"{cell}: {label}" for cell, label in zip(obs.index, obs[run.data.label_key], strict=True)]
    return scatter_figure(panels, columns, hover=hover, caption=_MAPS)


def verdicts(run: Run) -> list[str]:
    """Say plainly how the model compares with the better of the two kinds of PCA and with an untrained network: the sum first."""
    from annformer.cli.demo import PCA, SCALED, UNTRAINED

    ours, found, said = run.model.name, {}, []
    for classifier, rows in run.annotation[run.annotation.classifier != "majority class"].groupby("classifier", sort=False):
        f1 = rows.pivot(index="seed", columns="representation", values="macro_f1")
        floor = str(f1[[PCA, SCALED]].mean().idxmax())
        found[str(classifier)] = verdict(f1, ours, floor)
        said.append(f"Labels of held-out cells by {classifier}: {_compared(f1, ours, floor)}; {_compared(f1, ours, UNTRAINED)}.")
    bio = run.clustering.set_index("representation")["avg_bio"]
    floor = str(bio[[PCA, SCALED]].idxmax())
    difference = float(bio[ours] - bio[floor])
    found["AvgBIO"] = "no clear difference" if abs(difference) < SAME else "better" if difference > 0 else "worse"
    scores = f"{bio[ours]:.3f} for {ours}, {bio[floor]:.3f} for {floor}, {bio[UNTRAINED]:.3f} for an {UNTRAINED}"
    said.append(f"Clusters and distances, without any labels (AvgBIO): {scores}.")
    return [_in_one_sentence(ours, found), *said]


def verdict(scores: pd.DataFrame, ours: str, other: str) -> Verdict:
    """Whether `ours` is better over the splits: nearly all of them must say so, by more than half of their spread."""
    difference = scores[ours] - scores[other]
    sign = 1 if difference.mean() >= 0 else -1
    wins = int((sign * difference > 0).sum())
    if wins < len(scores) - 1 or abs(difference.mean()) < difference.std(ddof=1) / 2:
        return "no clear difference"
    return "better" if sign > 0 else "worse"


def _compared(scores: pd.DataFrame, ours: str, other: str) -> str:
    better, worse = (ours, other) if scores[ours].mean() >= scores[other].mean() else (other, ours)
    wins = int((scores[better] > scores[worse]).sum())
    means = f"macro-F1 {scores[better].mean():.3f} against {scores[worse].mean():.3f}, better in {wins} of {len(scores)} splits"
    if verdict(scores, ours, other) == "no clear difference":
        return f"no clear difference between {ours} and {other} ({means})"
    return f"{better} is better than {worse} ({means})"


def _in_one_sentence(ours: str, found: Mapping[str, Verdict]) -> str:
    parts = []
    for kind in ("better", "worse", "no clear difference"):
        by = [how for how, result in found.items() if result == kind]
        what = kind if kind.startswith("no") else f"{kind} results"
        parts += [f"{what} by {' and '.join([', '.join(by[:-1])] * (len(by) > 1) + by[-1:])}"] if by else []
    n_better, n_worse = (list(found.values()).count(kind) for kind in ("better", "worse"))
    advice = f"use {ours}" if n_better > n_worse else "use PCA" if n_worse > n_better else "neither is the clear choice"
    return f"Verdict: held against PCA, {ours}, as it is and without training here, shows {'; '.join(parts)}. For these cells: {advice}."


def genes_sentence(run: Run) -> str:
    """Say how little of a cell the model gets to see here."""
    vocab, match = run.model.vocab, run.source.match(run.model.vocab).report()
    n_learned = len(vocab.genes) - len(vocab.untrained)
    read = np.concatenate([np.diff(batch.counts.indptr) for batch in run.source.batches(512, vocab=vocab)])
    return (
        f"Only {match.n_columns} genes are in this data set, and {run.model.name} has learned {n_learned:,}; {match.n_genes} are read, "
        f"{int(np.median(read))} of them expressed in a typical cell. Whole transcriptomes give the model several times as much to read."
    )


def _summary(run: Run) -> str:
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return (
        f"{run.adata.n_obs} real blood cells were embedded by {run.model.name}, a network of {n_parameters:,} parameters, as it is: "
        "nothing was trained for this page, and no label was shown to the network. Beside it stand the principal components of the same "
        f"cells and the same network with random weights. All of it took {sum(run.seconds.values()):.0f} seconds on one processor core."
    )


def _data_facts(run: Run) -> dict[str, object]:
    from annformer.datasets import content_hash

    counts, match = run.source.counts, run.source.match(run.model.vocab).report()
    return {
        "data set": run.data.title,
        "source": run.data.source,
        "licence": run.data.licence,
        "cells and genes": f"{run.adata.n_obs} cells, {run.adata.raw.n_vars} genes",
        "matrix used": f"{counts.where}: {counts.kind}. {counts.note}",
        "about": run.data.about,
        "labels": f"{run.data.label_key}: {run.adata.obs[run.data.label_key].nunique()} types",
        "genes matched": "; ".join(match.lines(run.model.name)),
        "time": ", ".join(f"{what} {seconds:.0f} s" for what, seconds in run.seconds.items()),
        "SHA-256 of names and values": content_hash(run.adata),
    }


def _caveats(run: Run) -> list[str]:
    from annformer.scgpt import DEFAULT_MODEL

    corpus = f"The corpus of {DEFAULT_MODEL} holds frozen blood cells of the same donor: other cells than these, but not another person."
    return [
        "PCA is computed on the very cells that it describes; the network was trained elsewhere. But PCA takes a second, and where it is "
        "as good, one data set on its own needs nothing else.",
        *([corpus] if run.model.name == DEFAULT_MODEL else []),
        "The matrix holds log-normalised values of 765 variable genes, chosen on these cells. So PCA of all genes is PCA of variable "
        "genes here, and the network lacks most of what it reads elsewhere. Bins are ranks within a cell: those that counts would give;"
        " for the profile the logarithms are undone.",
        "The labels were given by correlation with sorted reference populations: they are not the truth, some types overlap, and the "
        "rarest has 8 cells, so that macro-F1 moves with a handful of cells.",
        "The splits share cells: their standard deviation is not a confidence interval. One data set is no benchmark.",
        "A UMAP bends distances: trust the tables, not the gaps.",
    ]


_MAPS = (
    "Each point is a cell; all UMAPs are made with the same settings (15 neighbours). Point at a cell for its name, choose another column "
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
