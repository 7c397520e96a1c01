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
