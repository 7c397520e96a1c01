"""Which cells learn and which are held out, by label or by whole donors and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int

from annformer.errors import input_error

Names = Sequence[str] | np.ndarray | pd.Series
"""A name for each cell."""


class Fold(NamedTuple):
    """One way to part the cells.

    Attributes
    ----------
    name
        The groups that are held out, or the number of the fold.
    train, test
        Rows, ascending.
    """

    name: str
    train: Int[np.ndarray, "row"]
    test: Int[np.ndarray, "row"]


def folds(labels: Names, groups: Names | None = None, *, n_folds: int = 5, seed: int = 0) -> list[Fold]:
    """Hold every cell out once.

    Without groups, each label is spread over the folds as evenly as it goes: one with fewer cells than there are folds is missing from some
    test parts, and the single cell of a label is tested by a fold that never saw it.

    Parameters
    ----------
    labels
        Cell types.
    groups
        Donors or batches, held out as a whole: one a fold, or, when they are more than `n_folds`, joined to folds of similar size.
    n_folds
        At most.
    seed
        Which cells, or which of several equally large groups, go together.
    """
    n = len(labels)
    if n_folds < 2 or n < 2:
        found = f"{n} cell(s) are to be parted into {n_folds} fold(s)"
        raise input_error(found, "two cells and two folds at least", "give more cells, or set n_folds to 2 or more")
    rng = np.random.default_rng(seed)
    if groups is None:
        fold = np.empty(n, dtype=np.int64)
        fold[_by_label(labels, rng)] = np.arange(n) % n_folds
        names = [f"fold {i + 1}" for i in range(min(n_folds, n))]
    else:
        fold, names = _join(groups, n_folds, rng)
        assert len(fold) == n, "labels and groups have different numbers of cells"
    return [Fold(name, np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i, name in enumerate(names)]


def train_and_held_back(
    labels: Names, groups: Names | None, share: float, seed: int
) -> tuple[Int[np.ndarray, "row"], Int[np.ndarray, "row"]]:
    """Hold some of the training cells back, to stop or calibrate by; every label keeps cells to learn from.

    Parameters
    ----------
    labels
        Cell types. Of each, `share` is held back as exactly as whole cells allow, but never its only cell.
    groups
        Donors or batches, held back as a whole: as many as bring the share nearest to the one asked for, one at least. Cells of a label
        that no other group has stay in training. None, or one group only: cells are held back.
    share
        Between 0 and 1.
    seed
        Which.

    Returns
    -------
    Rows to learn from and rows held back, ascending.
    """
    assert 0 < share < 1, share
    rng = np.random.default_rng(seed)
    label = _codes(labels)
    group = np.zeros_like(label) if groups is None else _codes(groups)
    held = _some_groups(group, share, rng) if group.any() else _some_cells(labels, share, rng)
    kept = np.bincount(label[~held], minlength=label.max() + 1)
    held &= kept[label] > 0
    if not held.any():
        found = f"no cell of {len(label)} can be held back: every label would lose its only cell, or its only group"
        raise input_error(found, "a label with two cells, or in two groups", "give more cells, or merge the rare labels")
    return np.flatnonzero(~held), np.flatnonzero(held)


def _codes(names: Names) -> Int[np.ndarray, "cell"]:
    codes, _ = pd.factorize(pd.Series(np.asarray(names, dtype=object)), use_na_sentinel=False)
    return codes.astype(np.int64)


def _by_label(labels: Names, rng: np.random.Generator) -> Int[np.ndarray, "row"]:
    """Rows in random order within their label: dealt in turn, every fold gets its part of each."""
    shuffled = rng.permutation(len(labels))
    return shuffled[np.argsort(_codes(labels)[shuffled], kind="stable")]


def _join(groups: Names, n_folds: int, rng: np.random.Generator) -> tuple[Int[np.ndarray, "cell"], list[str]]:
    """Fold of every cell: the largest group goes first, each into the fold that is smallest so far."""
    given = pd.Series(np.asarray(groups, dtype=object))
    codes, names = pd.factorize(given, sort=True)
    if (codes < 0).any() or len(names) < 2:
        missing = int((codes < 0).sum())
        found = f"{missing} of {len(codes)} cells have no group" if missing else f"all cells are of the group {names[0]}"
        raise input_error(found, "two groups at least, and one for every cell", "name the column of the donors or batches, or give none")
    sizes = np.bincount(codes)
    fold_of, filled = np.empty(len(names), dtype=np.int64), np.zeros(min(n_folds, len(names)), dtype=np.int64)
    shuffled = rng.permutation(len(names))
    for code in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold_of[code] = filled.argmin()
        filled[fold_of[code]] += sizes[code]
    order = pd.unique(fold_of)  # folds in the order of their first group
    return np.argsort(order)[fold_of][codes], [_called([str(name) for name in names[fold_of == i]]) for i in order]


def _called(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _some_groups(group: Int[np.ndarray, "cell"], share: float, rng: np.random.Generator) -> np.ndarray:
    sizes = np.bincount(group)
    wanted, n_held = share * len(group), 0
    chosen: list[int] = []
    for code in rng.permutation(len(sizes)):
        if abs(n_held + sizes[code] - wanted) < abs(n_held - wanted) and len(chosen) < len(sizes) - 1:
            chosen.append(int(code))
            n_held += sizes[code]
    return np.isin(group, chosen or [sizes.argmin()])


def _some_cells(labels: Names, share: float, rng: np.random.Generator) -> np.ndarray:
    """Every cell whose turn comes, in an order by label: the share is met in each label, and by the rare ones together."""
    order = _by_label(labels, rng)
    first = np.append(True, np.diff(_codes(labels)[order]) != 0)
    asked = order[~first]  # the first cell of each label stays in training
    share = min(share * len(order) / max(len(asked), 1), 1.0)
    turns = np.floor(np.arange(len(asked) + 1) * share + rng.random())
    held = np.zeros(len(order), dtype=bool)
    held[asked[np.diff(turns) > 0]] = True
    return held
