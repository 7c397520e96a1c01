"""Annotation of cell types: annformer beside logistic regression, neighbours and CellTypist, on cells held out from all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from anndata import AnnData

from annformer.comparison import annotation_scores as scoring
from annformer.comparison.annotation_cells import (
    Typed,
    confusion_table,
    counted,
    folds_table,
    predictions_table,
    reliability_table,
    splits_of,
    typed_cells,
)
from annformer.comparison.annotation_methods import EXPRESSION, MAPPING, NETWORK, OURS, SCRATCH, methods
from annformer.comparison.annotation_result import AnnotationComparison
from annformer.comparison.calls import Called, Caller, CallRun, Split, run_folds, shuffled, with_parts
from annformer.comparison.cells import colours_of, data_card, drawn_cells, not_coloured
from annformer.comparison.embedded import EMBEDDING, embed_once
from annformer.comparison.facts import as_yaml, card_says, card_text, model_facts, version_facts
from annformer.comparison.kept import Kept, digest, plain_options
from annformer.comparison.methods import choose, threads_kept
from annformer.comparison.result import Facts, Maps
from annformer.comparison.verdicts import caveats, held_against, sentence, verdict_table
from annformer.data.anndata import AnnDataSource, reading_quietly
from annformer.durations import in_words
from annformer.evaluate.classification import confusion
from annformer.evaluate.verdict import FEWEST_UNITS, draws
from annformer.report import umap
from annformer.scgpt import DEFAULT_MODEL, ScGPT
from annformer.tasks._annotation_recipe import AnnotationRecipe

log = logging.getLogger(__name__)

HELD_AGAINST: Final = {
    EXPRESSION: "the same without the network",
    NETWORK: "the same without the genes themselves",
    MAPPING: "the types of the nearest cells by the embedding",
    SCRATCH: "the same with a network of random weights",
}
PACKAGES: Final = ("annformer", "torch", "scanpy", "anndata", "numpy", "scipy", "scikit-learn", "umap-learn", "celltypist")
CALLED_AS, RIGHT = "called", "right or wrong"
"""Columns of the map."""
PLAINEST = "logistic regression all genes"
"""The floor whose confidence is held against the novelty of ours."""
MOST_NOVEL_TYPES, MOST_NOVEL_CELLS = 12, 2_500
"""Up to here each type is left out in turn unless somebody says otherwise: every time the classifier learns anew."""


def compare_annotation(
    adata: AnnData,
    *,
    label_key: str,
    batch_key: str | None = None,
    model: ScGPT | str | Path = DEFAULT_MODEL,
    seeds: Sequence[int] = (0, 1, 2),
    wanted: Sequence[str] | None = None,
    table: Mapping[str, Caller] | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    n_draws: int = 1_000,
    novelty: bool | None = None,
    name: str = "cells in memory",
    command: str = "",
    folder: str | Path | None = None,
    **classifier: Any,
) -> AnnotationComparison:
    """Call the types of cells that were held out with annformer and with the simple methods, score all of them, and judge ours.

    Every cell is held out once: with its whole batch where batches are named, and, to show how much easier that is, at random. A method
    gets the other cells with their types, and of those held out the counts only. `adata` is not changed.

    Parameters
    ----------
    adata
        Cells with counts and types; those with "unlabelled", "unknown", "unassigned" or nothing for a type are left out.
    label_key
        Column of `obs` with the type of every cell.
    batch_key
        Column of `obs` with the batch, donor or study; None: cells are held out at random only.
    model
        The pretrained model.
    seeds
        Methods with randomness are run with each of them, the others, and all of them in the easier split, with the first.
    wanted
        Names of methods; None: all that can run here and are not slow.
    table
        Methods by name; None: those of `methods`.
    layer, gene_key
        As for `embed`.
    n_draws
        Bootstrap draws under a verdict.
    novelty
        Leave one type after the other out of what is learned from, to see whether its cells stand out; None: where that is quick.
    name
        What the cells are called on the page.
    command
        What makes the same comparison again.
    folder
        Keeps what finished runs returned, so that the same call goes on after a kill. Nobody removes it. With a `table` of your own
        nothing is kept: nobody could tell whether its functions are the same.
    **classifier
        Further options of `CellTypeClassifier`, such as `recipe` or `threads`.
    """
    task = typed_cells(AnnDataSource(adata, gene_key=gene_key, layer=layer), label_key, batch_key)
    splits = splits_of(task, seeds)
    loaded = model if isinstance(model, ScGPT) else ScGPT.from_pretrained(model)
    every = methods(loaded, **classifier) if table is None else table
    by_name = {key: row.only_by_name for key, row in every.items() if wanted is None and row.only_by_name is not None}
    chosen, skipped = choose({key: row for key, row in every.items() if key not in by_name}, wanted)
    chosen.sort(key=list(every.values()).index)  # the verdicts are about the first of ours in the table, however they were named
    genes = task.source.match(loaded.vocab).report().lines(loaded.name)
    told = [task.truth] if task.batches is None else [task.truth, task.batches]
    options = plain_options(AnnotationRecipe, "annotate", classifier)
    job = {"cells": digest(task.cells, told), "model": loaded.fingerprint, "options": options}
    kept = Kept(folder if table is None else None, job)
    with reading_quietly(), _only_warnings("annformer.tasks"):
        seconds = embed_once(task.cells, loaded, classifier, kept)
        runs = with_parts(run_folds(chosen, task.cells, task.truth, splits, kept))
        known = _novel(chosen, runs, task, splits[-1], kept, n_draws, wanted=novelty)
    card = "" if isinstance(model, ScGPT) else card_text(model)
    n_types = len(set(task.truth))
    facts = Facts(
        cells=data_card(task.source, name, kept=task.kept, label_key=label_key, batch_key=batch_key, n_labels=n_types, lacking="a type")
        | not_coloured(adata.obs, label_key, batch_key),
        cells_by=counted(task),
        genes=genes,
        model=model_facts(loaded, card),
        card=card_says(card),
        command=command,
        versions=version_facts(PACKAGES, seeds=", ".join(map(str, seeds))),
        definitions=scoring.DEFINITIONS,
        skipped=skipped | by_name,
        recipe=as_yaml(options["recipe"]) if table is None and any(row.name in (OURS, SCRATCH) for row in chosen) else "",
    )
    runs = [
        replace(run, seconds=run.seconds + seconds) if run.name in {row.name for row in chosen if row.embedded} else run for run in runs
    ]
    with threads_kept():
        return _judged(adata, task, splits, runs, known, facts, n_draws)


def _novel(
    chosen: Sequence[Caller], runs: Sequence[CallRun], task: Typed, split: Split, kept: Kept, n_draws: int, *, wanted: bool | None
) -> scoring.NovelTypes:
    """Ours and the plainest floor on types that nobody taught."""
    n_types = len(set(task.truth))
    quick = 3 <= n_types <= MOST_NOVEL_TYPES and len(task.truth) <= MOST_NOVEL_CELLS
    ours = [caller for caller in chosen if caller.kind == "ours"][:1]
    if ours[0].name != OURS or not (quick if wanted is None else wanted):
        return scoring.NovelTypes()
    asked = [*ours, *(caller for caller in chosen if caller.name == PLAINEST)]
    each = sum(np.mean([run.seconds for run in runs if (run.name, run.split) == (caller.name, split.name)]) for caller in asked)
    log.info("leaving each of %d types out of what is learned from, once: about %s", n_types, in_words(n_types * float(each)))
    return scoring.novelty_of(asked, task.cells, task.truth, split, split.seeds[0], kept, n_draws)


def _judged(
    adata: AnnData,
    task: Typed,
    splits: Sequence[Split],
    runs: list[CallRun],
    novel: scoring.NovelTypes,
    facts: Facts,
    n_draws: int,
) -> AnnotationComparison:
    """Score the runs and judge ours."""
    hard, truth, seed = splits[0], task.truth, splits[0].seeds[0]
    ours = next(run.name for run in runs if run.kind == "ours")
    runs = [*runs, shuffled(runs, ours, hard.name, seed)]
    judged = [run for run in runs if run.split == hard.name]
    log.info("scoring %d runs, %d bootstrap draws of %d cells", len(runs), n_draws, len(truth))
    n_units = _n_units(task)
    rows = [draw.astype(np.int32) for draw in draws(task.batches if n_units else None, truth, n_draws, seed)]
    drawn = scoring.on_draws(judged, truth, rows)
    scores, per_type = scoring.score_runs(runs, truth)
    ours_first = scores[scores["split"] == hard.name].reset_index(drop=True)
    means = ours_first.groupby(["method", "kind"], sort=False).mean(numeric_only=True).reset_index()
    verdicts = verdict_table(means, drawn, ours, n_units, tuple(scoring.JUDGED))
    best = str(verdicts.loc[verdicts["best_floor"] & (verdicts["score"] == "macro_f1"), "other"].iloc[0])
    first: dict[str, Called] = {}
    for run in judged:
        first.setdefault(run.name, run.called)
    confusions = {name: confusion(truth, first[name].types) for name in (ours, best)}
    reliability, coverage = scoring.reliability_of(judged, truth), scoring.coverage_of(runs, ours, truth)
    log.info("drawing the map")
    return AnnotationComparison(
        task="annotate",
        ours=ours,
        scores=ours_first,
        verdicts=verdicts,
        unit=_unit(task),
        n_units=n_units,
        n_draws=n_draws,
        n_left_out=0,
        per_label=per_type[per_type["split"] == hard.name].drop(columns="split").reset_index(drop=True),
        embeddings={},
        maps=_maps(adata, task, first[ours], seed),
        history=pd.DataFrame(),
        facts=facts,
        sentence=sentence(verdicts, means, scoring.JUDGED),
        notes=held_against(verdicts, HELD_AGAINST, "macro_f1") + caveats(len(hard.seeds)),
        judged=tuple(scoring.JUDGED),
        more_tables={
            "scores.csv": scores,
            "per_type.csv": per_type,
            "predictions.csv": predictions_table(task, hard, first, ours),
            "confusion.csv": confusion_table(confusions),
            "reliability.csv": reliability_table(reliability),
            "coverage.csv": coverage,
            "novelty.csv": novel.by_type,
            "novelty_mean.csv": novel.mean,
        },
        split=hard.name,
        folds=folds_table(hard, truth),
        n_unseen=int((~scoring.seen_before(hard, truth)).sum()),
        beside=scores.groupby(["method", "kind", "split"], sort=False).mean(numeric_only=True).drop(columns="seed").reset_index(),
        confusions=confusions,
        reliability=reliability,
        error=scoring.error_of(judged, ours, truth, rows),
        calibrated=scoring.calibrated_of(judged, ours),
        coverage=coverage,
        novelty=novel.by_type,
        novelty_mean=novel.mean,
    )


def _n_units(task: Typed) -> int | None:
    """Batches that the bootstrap draws, None where it draws cells."""
    n_batches = 0 if task.batches is None else len(set(task.batches))
    return n_batches if n_batches >= FEWEST_UNITS else None


def _unit(task: Typed) -> str:
    if (n_units := _n_units(task)) is not None:
        return f"whole batches ({n_units} of them)"
    few = "" if task.batches is None else f" (with {len(set(task.batches))} batches, too few to draw batches)"
    return f"cells within their type{few}"


def _maps(adata: AnnData, task: Typed, called: Called, seed: int) -> Maps:
    """One map of our embedding; what is called and whether it is right stand beside the types."""
    embedding = np.asarray(task.cells.obsm[EMBEDDING])
    rows = drawn_cells(task.truth, np.isfinite(embedding).all(axis=1), seed)
    columns = colours_of(adata.obs[task.kept], task.label_key, task.batch_key)
    right = np.where(called.types == task.truth, "right", "wrong")
    more = {CALLED_AS: called.types, RIGHT: right} | ({} if called.confidence is None else {"confidence": called.confidence})
    # by position: names of cells may occur twice
    placed = pd.DataFrame({task.label_key: columns[task.label_key].to_numpy()} | more, index=columns.index)
    others = columns.drop(columns=[task.label_key, *(name for name in more if name in columns)])
    return Maps(
        rows,
        {"embedding of annformer": umap(embedding[rows], seed=seed)},
        pd.concat([placed.reset_index(drop=True), others.reset_index(drop=True)], axis=1).set_axis(columns.index).iloc[rows],
    )


@contextmanager
def _only_warnings(name: str) -> Iterator[None]:
    """Every fit says what it learns from: once is enough of that, and the page has it."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)


compare = compare_annotation
"""What the table of tasks calls."""
