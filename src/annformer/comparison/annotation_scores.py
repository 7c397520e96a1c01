"""What runs on folds are worth: scores, calibration, sets, what a type that nobody taught looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float, Int, Shaped

from annformer.comparison.calls import Called, Caller, CallRun, Given, Split, parted
from annformer.comparison.kept import NOTHING_KEPT, Kept
from annformer.data.split import Fold
from annformer.evaluate import calibration
from annformer.evaluate.classification import CLASSIFICATION_DEFINITIONS, classification_scores, macro_f1_on_draws, per_type_scores
from annformer.evaluate.verdict import draws

JUDGED: Final = {"macro_f1": "macro-F1", "accuracy": "accuracy"}
"""The scores that get verdicts, the one that decides first -> how they are called."""
COVERAGE = 0.9
DEFINITIONS: Final = CLASSIFICATION_DEFINITIONS | {
    "ece": "expected calibration error: mean distance between the confidence of a call and the share of right calls, over bins of equally "
    "many cells of similar confidence; less is better, and more than 0 by chance alone even where every confidence is right",
}
COVERAGE_WORDS: Final = {
    "coverage": f"share of the cells whose set of types holds the true one; {COVERAGE} is what was asked for",
    "expected": "where that share lies in 99 % of the cases if each cell is covered with the probability asked for (binomial)",
    "mean size": "types in a set",
}


class NovelTypes(NamedTuple):
    """How well cells of types stand out that were left out of what is learned from: AUROC, with the ends of its 95 % interval."""

    by_type: pd.DataFrame = pd.DataFrame(columns=["label", "method", "n", "auroc", "low", "high"])
    """A row per type and method; `n` cells of the type."""
    mean: pd.DataFrame = pd.DataFrame(columns=["method", "n", "auroc", "low", "high"])
    """Over the types, `n` of them: a row per method."""


def score_runs(runs: Sequence[CallRun], truth: Shaped[np.ndarray, "cell"]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every run.

    Returns
    -------
    One row per run; scores by split, method and type, averaged over seeds.
    """
    rows, by_type = [], []
    for run in runs:
        said = run.called
        error = np.nan if said.confidence is None else calibration.expected_calibration_error(*_confidence(said, truth))
        named = {"method": run.name, "kind": run.kind, "split": run.split, "seed": run.seed}
        scores = classification_scores(truth, said.types)
        rows.append(named | {"seconds": run.seconds, "memory_mb": run.memory_mb} | scores | {"ece": error})
        by_type.append(per_type_scores(truth, said.types).rename(columns={"type": "label"}).assign(method=run.name, split=run.split))
    table = pd.concat(by_type).groupby(["split", "method", "label"], sort=False).mean(numeric_only=True).reset_index()
    return pd.DataFrame(rows), table


def on_draws(
    runs: Sequence[CallRun], truth: Shaped[np.ndarray, "cell"], drawn: Sequence[Int[np.ndarray, "row"]]
) -> dict[str, Float[np.ndarray, "draw score"]]:
    """Score every method on the same draws, its seeds averaged; the columns are `JUDGED`."""
    found: dict[str, list[np.ndarray]] = {}
    for run in runs:
        right = (run.called.types == truth).astype(np.float64)
        accuracy = np.array([right[rows].mean() for rows in drawn])
        found.setdefault(run.name, []).append(np.c_[macro_f1_on_draws(truth, run.called.types, drawn), accuracy])
    return {name: np.mean(some, axis=0) for name, some in found.items()}


def reliability_of(runs: Sequence[CallRun], truth: Shaped[np.ndarray, "cell"]) -> dict[str, pd.DataFrame]:
    """Confidence and share of right calls of every method that says how sure it is, all seeds together."""
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in runs:
        if run.called.confidence is not None:
            pooled.setdefault(run.name, []).append(_confidence(run.called, truth))
    return {
        name: calibration.reliability(np.concatenate([said for said, _ in some]), np.concatenate([right for _, right in some]))
        for name, some in pooled.items()
    }


def calibrated_of(runs: Sequence[CallRun], ours: str) -> calibration.Interval | None:
    """Error that the confidences of `ours` would have if they were right: what its own is to be held against."""
    said = next(run.called for run in runs if run.name == ours)
    return None if said.confidence is None else calibration.calibrated_error(np.clip(np.nan_to_num(said.confidence), 0, 1))


def error_of(
    runs: Sequence[CallRun], ours: str, truth: Shaped[np.ndarray, "cell"], rows: Sequence[np.ndarray]
) -> calibration.Interval | None:
    """Calibration error of `ours` on bootstrap draws, with its first seed."""
    said = next(run.called for run in runs if run.name == ours)
    if said.confidence is None:
        return None
    confidence = np.clip(np.nan_to_num(said.confidence), 0, 1)
    return calibration.interval(calibration.calibration_error_on_draws(confidence, said.types == truth, rows))


def coverage_of(runs: Sequence[CallRun], ours: str, truth: Shaped[np.ndarray, "cell"]) -> pd.DataFrame:
    """Sets of `ours` by split, mean over the seeds: coverage, where it ought to lie, mean size, shares of sets of one type and of none."""
    rows = []
    for run in runs:
        if run.name == ours and run.called.sets is not None:
            codes = pd.Index(run.called.sets.columns).get_indexer(pd.Index(truth))
            rows.append({"split": run.split, "cells": len(truth)} | calibration.coverage(run.called.sets.to_numpy(), codes))
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).groupby("split", sort=False).mean().reset_index().astype({"cells": int})
    table["low"], table["high"] = calibration.coverage_interval(len(truth), COVERAGE)
    return table


def novelty_of(
    callers: Sequence[Caller],
    cells: AnnData,
    labels: Shaped[np.ndarray, "cell"],
    split: Split,
    seed: int,
    kept: Kept = NOTHING_KEPT,
    n_draws: int = 1_000,
) -> NovelTypes:
    """Leave one type after the other out of what is learned from, and see whether its cells stand out among those of the first fold.

    The score is what a method says of novelty, or, where it says nothing, 1 - confidence. Cells are drawn within their type, those of the
    fold and the others apart, and all types by the same draws: so the draws of the mean over the types are those that it has.
    """
    first, rows, on_draws = split.folds[0], [], dict[str, list[np.ndarray]]()
    asked = np.isin(np.arange(len(labels)), first.test)
    strata = [f"{label}|{inside}" for label, inside in zip(labels, asked, strict=True)]
    drawn = [rows.astype(np.int32) for rows in draws(None, strata, n_draws, seed)]  # all are kept: half the memory
    for label in pd.unique(labels):
        fold = _without(first, labels == label)
        if len(set(labels[fold.train])) < 2 or not (labels[fold.test] != label).any():
            continue
        given = Given(*parted(cells, fold, labels, split.batches), fold, split.batches is not None)
        is_new, place = labels[fold.test] == label, np.full(len(labels), -1)
        place[fold.test] = np.arange(len(fold.test))
        for caller in callers:
            said, _, _ = given.run(caller, seed, kept)
            strange = said.novelty if said.novelty is not None else None if said.confidence is None else 1 - said.confidence
            if strange is not None:
                strange = np.nan_to_num(strange, nan=1.0)
                inside = (place[some][place[some] >= 0] for some in drawn)
                on_draws.setdefault(caller.name, []).append(calibration.novelty_auroc_on_draws(strange, is_new, inside))
                auroc, ends = calibration.novelty_auroc(strange, is_new), _ends(on_draws[caller.name][-1])
                rows.append({"label": label, "method": caller.name, "n": int(is_new.sum()), "auroc": auroc, **ends})
    if not rows:
        return NovelTypes()
    table = pd.DataFrame(rows)
    means = [
        {"method": name, "n": len(some), "auroc": table.loc[table["method"] == name, "auroc"].mean(), **_ends(np.mean(some, axis=0))}
        for name, some in on_draws.items()
    ]
    return NovelTypes(table, pd.DataFrame(means))


def _ends(values: Float[np.ndarray, "draw"]) -> dict[str, float]:
    found = calibration.interval(values)
    return {"low": found.low, "high": found.high}


def seen_before(split: Split, labels: Shaped[np.ndarray, "cell"]) -> np.ndarray:
    """Cells whose type occurs in what is learned from when they are held out: nobody can call the others rightly."""
    seen = np.zeros(len(labels), dtype=bool)
    for fold in split.folds:
        seen[fold.test] = np.isin(labels[fold.test], labels[fold.train])
    return seen


def _without(fold: Fold, new: np.ndarray) -> Fold:
    """Nothing of the type is learned from; all its cells are asked about."""
    return Fold(fold.name, fold.train[~new[fold.train]], np.union1d(fold.test, np.flatnonzero(new)))


def _confidence(said: Called, truth: Shaped[np.ndarray, "cell"]) -> tuple[np.ndarray, np.ndarray]:
    """A cell of which nothing can be said is called with no confidence at all."""
    assert said.confidence is not None
    return np.clip(np.nan_to_num(np.asarray(said.confidence, np.float64)), 0, 1), said.types == truth
