"""The cells of a comparison of annotation: which have a type, how they are held out, what stands of them in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Shaped

from annformer.comparison.annotation_scores import seen_before
from annformer.comparison.calls import Called, Split
from annformer.comparison.cells import blind_cells, labels_of
from annformer.data.anndata import AnnDataSource
from annformer.data.split import folds
from annformer.errors import input_error
from annformer.tasks._annotation_cells import NO_TYPE, say_if_logarithms

BY_BATCH, RANDOM = "whole batches", "random cells"
"""Splits by what is held out."""
MOST_FOLDS = 5


class Typed(NamedTuple):
    """Cells with a type; batches and places in the source beside them."""

    source: AnnDataSource
    cells: AnnData
    truth: Shaped[np.ndarray, "cell"]
    batches: Shaped[np.ndarray, "cell"] | None
    kept: Bool[np.ndarray, "whole"]
    label_key: str
    batch_key: str | None


def typed_cells(source: AnnDataSource, label_key: str, batch_key: str | None) -> Typed:
    """Read the cells that have a type; logarithms are undone, for all methods alike.

    Raises
    ------
    InputError
        When a column is missing, or its values are no types that several cells share.
    """
    labels = labels_of(source, label_key)
    kept = ~np.isin(labels, NO_TYPE)
    say_if_logarithms(source)
    blind = blind_cells(source, batch_key, undo=True)
    batches = None if batch_key is None else blind.obs[batch_key].astype(str).to_numpy(dtype=object)[kept]
    truth = labels[kept].astype(object)
    n_types = len(set(truth))
    if n_types > max(20, len(truth) // 2):
        found = f"obs[{label_key!r}] has {n_types:,} values for {len(truth):,} cells"
        raise input_error(found, "types that many cells share", "name another column with label_key (--label_key)")
    return Typed(source, blind[kept].copy(), truth, batches, kept, label_key, batch_key)


def splits_of(task: Typed, seeds: Sequence[int]) -> list[Split]:
    """The harder one, which gets the verdicts, first.

    Raises
    ------
    InputError
        When some fold leaves less than two types to learn from.
    """
    random = folds(task.truth, n_folds=MOST_FOLDS, seed=seeds[0])
    splits = [Split(RANDOM, random, seeds if task.batches is None else seeds[:1])]
    if task.batches is not None:
        splits.insert(0, Split(BY_BATCH, folds(task.truth, task.batches, n_folds=MOST_FOLDS, seed=seeds[0]), seeds, task.batches))
    for split in splits:
        for fold in split.folds:
            if len(left := set(task.truth[fold.train])) < 2:
                found = f"with {fold.name} held out there is {f'one type, {left.pop()!r},' if left else 'nothing'} to learn from"
                remedy = "name another column with --batch_key, or leave it out" if split.batches is not None else "give more cells"
                raise input_error(found, "two types at least outside of whatever is held out", remedy)
    return splits


def counted(task: Typed) -> pd.DataFrame:
    """Cells by type and batch."""
    of = pd.Series("all" if task.batches is None else task.batches, index=range(len(task.truth)), name=task.batch_key or "cells")
    return pd.crosstab(pd.Series(task.truth, name=task.label_key), of)


def folds_table(split: Split, truth: Shaped[np.ndarray, "cell"]) -> pd.DataFrame:
    """What is held out in each fold, and what is left to learn from."""
    seen = seen_before(split, truth)
    rows = [
        {
            "held out": fold.name,
            "cells": len(fold.test),
            "of types": len(set(truth[fold.test])),
            "learned from": len(fold.train),
            "of types nobody could learn": int((~seen[fold.test]).sum()),
        }
        for fold in split.folds
    ]
    return pd.DataFrame(rows)


def predictions_table(task: Typed, split: Split, called: Mapping[str, Called], ours: str) -> pd.DataFrame:
    """One row per cell: what every method calls it, with the first seed."""
    names = np.empty(len(task.truth), dtype=object)
    for fold in split.folds:
        names[fold.test] = fold.name
    table = pd.DataFrame({"cell": task.cells.obs_names, "type": task.truth, "held out with": names})
    for name, said in called.items():
        table[name] = said.types
    said = called[ours]
    if said.confidence is not None:
        table[f"{ours}: confidence"] = said.confidence
    if said.novelty is not None:
        table[f"{ours}: novelty"] = said.novelty
    if said.sets is not None:
        columns = said.sets.columns.to_numpy()
        table[f"{ours}: set"] = [" | ".join(columns[row]) for row in said.sets.to_numpy()]
    return table


def confusion_table(confusions: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per method, true type and called type: cells."""
    parts = [
        table.rename_axis(index="true").reset_index().melt("true", var_name="called", value_name="cells").assign(method=name)
        for name, table in confusions.items()
    ]
    return pd.concat(parts, ignore_index=True)[["method", "true", "called", "cells"]]


def reliability_table(reliability: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per method and bin of confidence."""
    return pd.concat([table.assign(method=name) for name, table in reliability.items()] or [pd.DataFrame()], ignore_index=True)
