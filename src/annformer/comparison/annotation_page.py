"""The page of a comparison of annotation: one HTML file for whoever has to decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from annformer.comparison.annotation_cells import BY_BATCH
from annformer.comparison.annotation_result import AnnotationComparison
from annformer.comparison.annotation_scores import COVERAGE, COVERAGE_WORDS, JUDGED
from annformer.comparison.calls import CONTROL
from annformer.comparison.page import (
    best_floor,
    cells_by,
    chosen,
    few_seeds,
    how_judged,
    labels_of,
    recipe,
    skipped,
    verdict_blocks,
)
from annformer.comparison.table import scores_table
from annformer.report import (
    Block,
    Bullets,
    Code,
    Facts,
    Figure,
    Note,
    Page,
    Table,
    Text,
    dot_figure,
    heat_figure,
    line_figure,
    scatter_figure,
)


def write_page(comparison: AnnotationComparison, path: Path) -> None:
    """Put everything on one page."""
    found = comparison.facts
    name = found.cells.get("cells", "cells")
    page = Page(f"Annotation of cell types: {comparison.ours} beside the simple methods on {name}", _summary(comparison))
    page.add(
        "Verdict",
        Note(comparison.sentence),
        *map(Text, comparison.notes),
        *verdict_blocks(comparison),
        Text(how_judged(comparison, "with what it calls each cell as it is")),
    )
    page.add("Scores", *_scores(comparison))
    page.add("How cells were held out", *_held_out(comparison))
    page.add("Types of cells", types(comparison), _types_table(comparison))
    page.add("What is taken for what", confusions(comparison))
    page.add("How sure it is, and how right", *_sureness(comparison))
    if len(comparison.novelty):
        page.add("Types that nobody taught", *_novelty(comparison))
    page.add("Maps", *maps(comparison))
    page.add("The cells", Facts(found.cells), cells_by(comparison))
    page.add("Genes", Bullets(found.genes))
    page.add("The model", *[Text(text) for text in [found.card] if text], Facts(found.model), *recipe(found))
    page.add("What the scores are", Facts(found.definitions))
    page.add("What this does not show", Bullets(_caveats(comparison)))
    page.add("How to get this page again", Code(found.command), Facts(found.versions), *skipped(comparison))
    page.write(path)


def types(comparison: AnnotationComparison) -> Figure:
    """Scores of every type by every method."""
    methods, order = chosen(comparison), labels_of(comparison)
    measures = {
        words: comparison.per_label.pivot(index="label", columns="method", values=column).reindex(index=order, columns=methods)
        for column, words in {"f1": "F1", "precision": "precision", "recall": "recall"}.items()
    }
    caption = "What the averages hide, the most frequent type first. All methods and types stand in per_type.csv."
    return dot_figure(measures, x="value, more is better", caption=caption)


def confusions(comparison: AnnotationComparison) -> Figure:
    """Ours and the best floor, side by side."""
    order = labels_of(comparison)
    others = sorted({str(name) for table in comparison.confusions.values() for name in table.columns} - set(order))
    tables = {name: table.reindex(index=order, columns=[*order, *others], fill_value=0) for name, table in comparison.confusions.items()}
    caption = (
        "Of the cells of each type (rows), how many percent are called what (columns), with the first seed: what lies off the diagonal "
        "is wrong. Point at a square for the number of cells."
    )
    return heat_figure(tables, x="called", y="type", caption=caption)


def reliability(comparison: AnnotationComparison) -> Figure:
    """Confidence against the share of right calls."""
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for name in chosen(comparison):
        bins = comparison.reliability.get(name)
        if bins is not None and np.ptp(bins["confidence"]) > _LEAST_WIDTH and len(lines) < _MOST_CURVES:
            lines[name] = bins["confidence"].to_list(), bins["correct"].to_list()
    caption = (
        "Each point of a curve is a bin of equally many cells. Along the diagonal a confidence of 0.8 means that 80 % of such calls "
        "are right; a curve below it is too sure of itself, one above it not sure enough."
    )
    lines["as sure as right"] = [0.0, 1.0], [0.0, 1.0]
    return line_figure(lines, x="confidence", y="share of right calls", caption=caption)


def maps(comparison: AnnotationComparison) -> list[Figure]:
    """Our embedding by type and by what is called, and by where that is wrong."""
    drawn = comparison.maps
    columns = drawn.columns
    label, called, right = (str(name) for name in columns.columns[:3])
    hover = [f"{cell}: {kind}, called {said}" for cell, kind, said in zip(columns.index, columns[label], columns[called], strict=True)]
    total = int(comparison.facts.cells_by.to_numpy().sum())
    shown = "all" if len(drawn.rows) == total else f"{len(drawn.rows):,} of the {total:,}"
    caption = (
        f"UMAP of {shown} cells by the embedding of the model as it is, before anything was learned from their types. On the left the "
        f"types, on the right what {comparison.ours} calls each cell when it is held out. Point at a cell for its name, choose other "
        "columns to colour by, click a label to hide it. A UMAP bends distances: trust the tables."
    )
    both = scatter_figure(drawn.by_method, columns, colour_by=[label, called], hover=hover, alike={called: label}, caption=caption)
    where = scatter_figure(drawn.by_method, columns[[right, label]], hover=hover, caption="The same map: where the calls are wrong.")
    return [both, where]


def _summary(comparison: AnnotationComparison) -> str:
    counted = comparison.facts.cells_by
    n_floors = int((comparison.means()["kind"] == "floor").sum())
    return (
        f"{int(counted.to_numpy().sum()):,} cells of {len(counted)} types, every one called when it was held out ({comparison.split}, "
        f"{len(comparison.folds)} folds). {n_floors} baselines learned from the same cells; no method saw the type of a cell that it "
        "called."
    )


def _scores(comparison: AnnotationComparison) -> list[Block]:
    means = comparison.means()
    bold = [n for n, name in enumerate(means["method"]) if name == comparison.ours]
    every = means[["method", *(name for name in comparison.facts.definitions if name not in JUDGED)]]
    more = every.rename(columns=lambda name: str(name).replace("_", " "))
    return [
        Table(scores_table(comparison), _TABLE, bold=bold),
        Table(more, "More of the same runs, mean over the seeds; ece of what says how sure it is only.", bold=bold),
    ]


def _held_out(comparison: AnnotationComparison) -> list[Block]:
    n = comparison.n_unseen
    missed = f" {n:,} cells are of types that nobody could learn when they were held out: every method calls them wrongly." if n else ""
    blocks: list[Block] = [Text(f"Scores and verdicts rest on these folds.{missed}"), Table(comparison.folds)]
    splits = list(dict.fromkeys(comparison.beside["split"]))
    if len(splits) > 1:
        blocks += _gap(comparison, splits)
    return blocks


def _gap(comparison: AnnotationComparison, splits: list[str]) -> list[Block]:
    """What it does to the scores that a batch is new."""
    order = [name for name in comparison.means()["method"] if name != CONTROL]
    wide = comparison.beside.pivot(index="method", columns="split", values=list(JUDGED)).loc[order]
    blocks: list[Block] = [Text(_GAP)]
    for score, words in JUDGED.items():
        hard, easy = (wide[score][split].to_numpy() for split in splits)
        lost = [f"{gap:+.3f}" for gap in hard - easy]
        blocks.append(Table(pd.DataFrame(dict(zip(["method", *splits, "lost"], [order, hard, easy, lost], strict=True))), f"{words}."))
    return blocks


def _types_table(comparison: AnnotationComparison) -> Table:
    """Ours beside the best floor."""
    best = best_floor(comparison)
    order = labels_of(comparison)
    shared = comparison.per_label.drop_duplicates("label").set_index("label").loc[order]
    table = pd.DataFrame({"type": order, "cells": shared["n"].astype(int).to_numpy()})
    for column, words in {"f1": "F1", "precision": "precision", "recall": "recall"}.items():
        values = comparison.per_label.pivot(index="label", columns="method", values=column).loc[order]
        table[words] = [f"{ours:.2f} / {floor:.2f}" for ours, floor in zip(values[comparison.ours], values[best], strict=True)]
    return Table(table, f"{comparison.ours} / {best}, the best baseline in macro-F1.")


def _sureness(comparison: AnnotationComparison) -> list[Block]:
    blocks: list[Block] = [reliability(comparison)] if comparison.reliability else []
    if (exact := comparison.calibrated) is not None and (own := comparison.error) is not None:
        error = float(comparison.scores.loc[comparison.scores["method"] == comparison.ours, "ece"].mean())
        blocks.append(
            Text(
                f"The expected calibration error of {comparison.ours} is {error:.3f} ({own.low:.3f} to {own.high:.3f} in 95 % of the "
                f"bootstrap draws, which make it look larger). Confidences that were right would show "
                f"{exact.median:.3f} with as many cells ({exact.low:.3f} to {exact.high:.3f} in 95 % of 1,000 simulations)."
            )
        )
    if len(comparison.coverage):
        blocks += [_coverage(comparison.coverage), Facts(COVERAGE_WORDS)]
    return blocks


def _coverage(found: pd.DataFrame) -> Table:
    table = pd.DataFrame({"held out": found["split"], "cells": found["cells"], "coverage": found["coverage"]})
    table["expected"] = [f"{low:.3f} to {high:.3f}" for low, high in zip(found["low"], found["high"], strict=True)]
    table["mean size"], table["of one type"], table["empty"] = found["mean_size"], found["singletons"], found["empty"]
    caption = (
        f"Sets of the types that cannot be excluded, made to hold the true one in {100 * COVERAGE:.0f} % of cells that are like those "
        "learned from. Held-out batches need not be like them: what is missing there is what the sets do not know. Sets may be empty here; "
        "`predict` writes the called type into such a set."
    )
    return Table(table, caption)


def _novelty(comparison: AnnotationComparison) -> list[Block]:
    by_method = {str(name): rows.set_index("label") for name, rows in comparison.novelty.groupby("method", sort=False)}
    labels = by_method[comparison.ours]["auroc"].sort_values(ascending=False).index
    columns: dict[str, list[object]] = {"type left out": [*labels, "mean"], "cells": [*by_method[comparison.ours]["n"].loc[labels], "-"]}
    for name, mean in comparison.novelty_mean.set_index("method").iterrows():
        rows = [row for _, row in by_method[str(name)].loc[labels].iterrows()] + [mean]
        columns[str(name)] = [float(row["auroc"]) for row in rows]
        columns[f"{name}, 95 %"] = [f"{row['low']:.3f} to {row['high']:.3f}" for row in rows]
    caption = (
        "One type after the other was left out of what is learned from (one fold, cells at random): share of pairs of a cell of that "
        "type and one of another in which the first is said to be stranger (AUROC; 0.5 is chance), and what other cells like these would "
        "show in 95 % of the cases (bootstrap). annformer: its novelty; the baseline: 1 - confidence."
    )
    return [Table(pd.DataFrame(columns), caption, bold=[len(labels)])]


def _caveats(comparison: AnnotationComparison) -> list[str]:
    new = "of batches that are new" if comparison.split == BY_BATCH else "of the same batches"
    few = "The intervals say what other cells like these would show, not what other batches or donors would."
    return [
        *([few] if comparison.n_units is None else []),
        *few_seeds(comparison),
        f"The scores are those of cells {new}; cells of another laboratory, tissue or disease are harder still.",
        "The types are those that somebody gave these cells, often with the help of one of the methods above. Where they are wrong, so "
        "are the scores.",
        "What a method chooses (genes, penalties, neighbours, weights of its parts) it chooses by cells that it learns from, never by "
        "those held out. The defaults of annformer were chosen by scores on public sets: for those this is no test on new data.",
        "A method that calls every cell something is scored so; in use, cells that look like nothing known ought to be called unassigned.",
        f"One set of cells is no benchmark. '{CONTROL}' is what {comparison.ours} calls, dealt to other cells: chance.",
    ]


_GAP = (
    "The same methods with whole batches held out, and with cells held out at random, so that every batch is among those learned from. The "
    "second is what most papers print, the first what new data will show. At random with the first seed only."
)
_MOST_CURVES = 5
_LEAST_WIDTH = 0.001
"""Of the confidences of a method that is drawn: one that is always as sure is a point, no curve."""
_TABLE = (
    "Best macro-F1 first; ± is the standard deviation over the seeds. Seconds: mean of a fold, to learn from all other cells and to "
    "call those held out; where annformer reads the embedding, with the seconds that making it for all cells took, once. Memory is by "
    "how much this process grew at its peak in any fold, looked at every 20 ms. The parts of annformer are read off its own run."
)
