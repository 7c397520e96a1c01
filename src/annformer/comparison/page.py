"""The page of a comparison: one HTML file for whoever has to decide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from annformer.comparison.facts import RECIPE_TITLE
from annformer.comparison.methods import CONTROL
from annformer.comparison.result import Comparison
from annformer.comparison.result import Facts as CellFacts
from annformer.comparison.table import scores_table, verdicts_table
from annformer.comparison.verdicts import VERDICTS
from annformer.evaluate.verdict import widening
from annformer.report import Block, Bullets, Code, Facts, Folded, Note, Page, Table, Text, dot_figure, line_panels, scatter_figure

if TYPE_CHECKING:
    from annformer.report import Figure

TASK_IN_WORDS = {"integrate": "Integration of batches"}
LABEL_SCORES = {
    "cluster_f1": "F1 of the best cluster",
    "silhouette": "silhouette of the type",
    "asw_batch": "mixing of its batches",
    "connected": "share in one piece",
}
"""Columns of `per_label` -> how they are called on the page."""


def write_page(comparison: Comparison, path: Path) -> None:
    """Put everything on one page."""
    found = comparison.facts
    name = found.cells.get("cells", "cells")
    page = Page(f"{TASK_IN_WORDS[comparison.task]}: {comparison.ours} beside the simple methods on {name}", _summary(comparison))
    page.add(
        "Verdict",
        Note(comparison.sentence),
        *map(Text, comparison.notes),
        *verdict_blocks(comparison),
        Text(_how_judged(comparison)),
    )
    page.add("Scores", *_scores(comparison))
    page.add("Maps", maps(comparison))
    page.add("Types of cells", types(comparison), _types_table(comparison))
    if len(comparison.history):
        page.add("Training", curves(comparison))
    page.add("The cells", Facts(found.cells), cells_by(comparison))
    page.add("Genes", Bullets(found.genes))
    page.add("The model", *[Text(text) for text in [found.card] if text], Facts(found.model), *recipe(found))
    page.add("What the scores are", Facts(found.definitions))
    page.add("What this does not show", Bullets(_caveats(comparison)))
    page.add("How to get this page again", Code(found.command), Facts(found.versions), *skipped(comparison))
    page.write(path)


def intervals(comparison: Comparison) -> Figure:
    """Differences to every other method with their intervals."""
    measures, ends = {}, {}
    order = comparison.means()["method"].to_list()
    for score, rows in comparison.verdicts.groupby("score", sort=False):
        table = rows.set_index("other").reindex([name for name in order if name != comparison.ours])
        measures[str(score)] = table[["difference"]]
        ends[str(score)] = table[["low"]].set_axis(["difference"], axis=1), table[["high"]].set_axis(["difference"], axis=1)
    caption = (
        f"{comparison.ours} less each other method, with the 95 % interval of the paired bootstrap: wholly right of the line is better, "
        "wholly left of it worse, across it a tie."
    )
    return dot_figure(measures, intervals=ends, marked=0.0, x=f"{comparison.ours} less the method", caption=caption)


def maps(comparison: Comparison) -> Figure:
    """UMAPs of all methods, by batch and by type side by side."""
    drawn = comparison.maps
    columns = drawn.columns
    batch, label = (str(name) for name in columns.columns[:2])
    hover = [f"{cell}: {kind}, {of}" for cell, kind, of in zip(columns.index, columns[label], columns[batch], strict=True)]
    order = [name for name in comparison.means()["method"] if name in drawn.by_method]
    ours_first = sorted(order, key=lambda name: name != comparison.ours)
    total = len(next(iter(comparison.embeddings.values())))
    shown = "all" if len(drawn.rows) == total else f"{len(drawn.rows):,} of the {total:,}"
    caption = (
        f"UMAPs of {shown} cells, all with the same settings (15 neighbours) and the first seed. Well integrated: on the left the batches "
        "overlap, on the right the types lie apart. Point at a cell for its name, choose other columns to colour by, click a label to hide "
        "it. Every label has its own pair of colour and shape, safe for colour-blind readers. A UMAP bends distances: trust the tables."
    )
    panels = {name: drawn.by_method[name] for name in ours_first}
    return scatter_figure(panels, columns, colour_by=[batch, label], hover=hover, caption=caption)


def types(comparison: Comparison) -> Figure:
    """Scores of every type by every method."""
    methods = chosen(comparison)
    measures = {
        words: comparison.per_label.pivot(index="label", columns="method", values=column).reindex(
            index=labels_of(comparison), columns=methods
        )
        for column, words in LABEL_SCORES.items()
    }
    caption = (
        "What the averages hide. F1 of the best cluster: how well one cluster matches the type; silhouette: whether "
        "the type lies apart, in [-1, 1]; mixing: 1 - |silhouette of the batches| within the type; share in one piece: cells in the "
        "type's largest connected part of the neighbour graph. All methods and types stand in per_type.csv."
    )
    return dot_figure(measures, x="value, more is better", caption=caption)


def curves(comparison: Comparison) -> Figure:
    """Losses over the steps, of the first seed."""
    history = comparison.history[comparison.history["seed"] == comparison.history["seed"].iloc[0]]
    losses = [str(name).removeprefix("validation/") for name in history if str(name).startswith("validation/")]
    panels = {loss.replace("_", " "): _lines(history, loss) for loss in losses}
    caption = "Losses during fine-tuning, of the first seed: on the cells that are learned from and on the cells held back to stop in time."
    return line_panels({title: lines for title, lines in panels.items() if lines}, x="step", y="loss", caption=caption)


def _lines(history: pd.DataFrame, loss: str) -> dict[str, tuple[Any, Any]]:
    lines = {}
    for method, rows in history.groupby("method", sort=False):
        for column, words in ((f"train/{loss}", "learned from"), (f"validation/{loss}", "held back")):
            some = rows[["step", column]].dropna() if column in rows else rows.iloc[:0]
            if len(some):
                lines[f"{method}, {words}"] = (some["step"].to_numpy(), some[column].to_numpy())
    return lines


def _summary(comparison: Comparison) -> str:
    counted = comparison.facts.cells_by
    n_floors = int((comparison.means()["kind"] == "floor").sum())
    return (
        f"{int(counted.to_numpy().sum()):,} cells of {counted.shape[1]} batches, {comparison.per_label['label'].nunique()} types. "
        f"{n_floors} baseline{'s' * (n_floors > 1)} got the same cells; no method saw a type."
    )


def verdict_blocks(comparison: Comparison) -> list[Block]:
    """Verdicts as tables and as a picture."""
    table, best = verdicts_table(comparison), comparison.verdicts["best_floor"].to_numpy()
    return [
        Table(table[best], "Against the best baseline by each score: the choice favours the baselines."),
        intervals(comparison),
        Table(table[~best], "Against every other method."),
    ]


def _scores(comparison: Comparison) -> list[Block]:
    means = comparison.means()
    bold = [n for n, name in enumerate(means["method"]) if name == comparison.ours]
    every = means[["method", *(name for name in comparison.facts.definitions if name not in VERDICTS)]]
    return [
        Table(scores_table(comparison), _TABLE, bold=bold),
        Table(
            every.rename(columns=lambda name: str(name).replace("_", " ")),
            _PARTS,
            bold=bold,
        ),
    ]


def _types_table(comparison: Comparison) -> Table:
    """Ours beside the best floor of the overall score."""
    best = best_floor(comparison)
    shared = comparison.per_label.drop_duplicates("label").set_index("label").loc[labels_of(comparison)]
    table = pd.DataFrame({"type": shared.index, "cells": shared["n"].astype(int).to_numpy()})
    table["batches"] = shared["n_batches"].astype(int).to_numpy()
    for column, words in LABEL_SCORES.items():
        values = comparison.per_label.pivot(index="label", columns="method", values=column).loc[shared.index]
        table[words] = [f"{ours:.2f} / {floor:.2f}" for ours, floor in zip(values[comparison.ours], values[best], strict=True)]
    return Table(table.replace("nan / nan", "-"), f"{comparison.ours} / {best}, the best baseline in the overall score.")


def cells_by(comparison: Comparison) -> Table:
    """How many cells of which type there are in which batch."""
    table = comparison.facts.cells_by
    return Table(table.reset_index(), f"Number of cells by {table.index.name} and {table.columns.name}.")


def recipe(found: CellFacts) -> list[Block]:
    """By which settings ours learned, folded away."""
    return [Folded(RECIPE_TITLE, found.recipe)] if found.recipe else []


def skipped(comparison: Comparison) -> list[Block]:
    """What was not run, and why."""
    if not comparison.facts.skipped:
        return []
    named = "; ".join(f"{name} ({why})" for name, why in comparison.facts.skipped.items())
    return [Note(f"Not run here, and so not beaten either: {named}.")]


def labels_of(comparison: Comparison) -> list[str]:
    """Types, the most frequent first."""
    counted = comparison.per_label.drop_duplicates("label").sort_values("n", ascending=False, kind="stable")
    return counted["label"].to_list()


def best_floor(comparison: Comparison) -> str:
    """By the score that decides first."""
    rows = comparison.verdicts[(comparison.verdicts["score"] == comparison.judged[0]) & comparison.verdicts["best_floor"]]
    return str(rows["other"].iloc[0])


def chosen(comparison: Comparison) -> list[str]:
    """Ours, then the others by the score that decides first, without the control: no more than can be told apart."""
    means = comparison.means()
    others = means[(means["method"] != comparison.ours) & (means["kind"] != "control")]["method"].to_list()
    return [comparison.ours, *others][:_MOST_DOTS]


def _how_judged(comparison: Comparison) -> str:
    return how_judged(comparison, "with its clusters and neighbours as they are")


def how_judged(comparison: Comparison, fixed: str) -> str:
    """Say how a verdict comes about; what is `fixed` is not made anew for a draw."""
    n, lost = comparison.n_units, comparison.n_left_out
    wider = "" if n is None else f", made {widening(n):.2f} times as wide: drawing {n} batches understates what others would change"
    left_out = f"{lost:,} draws without a cell that tells types or mixing were left out. " if lost else ""
    return (
        f"How a verdict comes about: {comparison.n_draws:,} bootstrap draws of {comparison.unit}; every method is scored on the same "
        f"draws, {fixed} and its seeds averaged. {left_out}The interval holds the middle 95 % of the "
        f"differences{wider}. 'beats' means that it lies above 0, 'loses' that it lies below; else it is a tie."
    )


def _caveats(comparison: Comparison) -> list[str]:
    few = comparison.n_units is None
    return [
        *([_FEW_BATCHES] if few else []),
        *few_seeds(comparison),
        "No method saw a type: each got counts, names of genes and batches, nothing else. annformer stops training by how well it "
        "reconstructs some of these cells that it does not learn from, never by a score; the other methods learn from all cells.",
        "The types are those that somebody gave these cells, often with the help of one of the methods above. Where they are wrong, so "
        "are the scores.",
        "Batches that differ in biology, such as treated and untreated cells, ought not to be mixed wholly: the scores do not know that.",
        "Clusters are found at the resolution that fits the types best, for every method alike: without types one could choose less well.",
        f"One set of cells is no benchmark. '{CONTROL}' is the embedding of {comparison.ours} with its rows dealt to other cells: chance.",
    ]


def few_seeds(comparison: Comparison) -> list[str]:
    """What must be said where nobody knows how much is chance."""
    n = int(comparison.scores.groupby("method", sort=False)["seed"].nunique().max())
    if n >= FEWEST_SEEDS:
        return []
    return [
        f"Methods with randomness ran with {n} seed{'s' if n > 1 else ''}: how much is chance nobody knows. Give {FEWEST_SEEDS} or more."
    ]


_FEW_BATCHES = (
    "There are too few batches to draw them: the intervals say what other cells of these batches would show, not what other batches would."
)
_PARTS = "What they are made of, and more: mean over the seeds."
_MOST_DOTS = 8
FEWEST_SEEDS = 3
_TABLE = (
    "Best overall score first; ± is the standard deviation over the seeds. Seconds and memory are those of one run from counts to "
    "embedding. Memory is by how much this process grew at its peak, looked at every 20 ms; what it had kept from earlier work and used "
    "again is not counted. The first method that needs a package also pays for loading it."
)
