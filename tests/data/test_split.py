from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annformer.data.split import folds
from annformer.errors import InputError

LABELS = np.repeat(["B", "NK", "T", "rare", "alone"], [53, 40, 100, 3, 1])
DONORS = np.random.default_rng(0).permutation(np.repeat(list("abcdefg"), [50, 40, 30, 30, 20, 20, 7]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=60), st.integers(2, 9), st.integers(0, 5), st.booleans())
def test_every_cell_is_tested_once_and_never_learnt_from_then(labels, n_folds, seed, by_group):
    groups = None if not by_group or len(set(labels)) < 2 else labels
    found = folds(labels, groups, n_folds=n_folds, seed=seed)
    assert sorted(np.concatenate([fold.test for fold in found])) == list(range(len(labels)))
    assert len(found) == min(n_folds, len(labels) if groups is None else len(set(labels)))
    assert len({fold.name for fold in found}) == len(found)
    for fold in found:
        assert len(fold.test)
        assert sorted([*fold.train, *fold.test]) == list(range(len(labels)))


def test_labels_are_spread_evenly_over_folds():
    found = folds(LABELS, seed=3)
    assert [fold.name for fold in found] == [f"fold {i}" for i in range(1, 6)]
    assert max(len(fold.test) for fold in found) - min(len(fold.test) for fold in found) <= 1
    for label in np.unique(LABELS):
        n = [int((LABELS[fold.test] == label).sum()) for fold in found]
        assert max(n) - min(n) <= 1, label


def test_the_seed_decides_the_folds():
    first, again, other = (folds(LABELS, seed=seed)[0].test for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    in_order = folds(np.repeat(["x", "y"], 50))[0].test
    assert len(set(np.diff(in_order))) > 1, "cells are shuffled within their label"


def test_few_groups_are_left_out_one_by_one():
    found = folds(LABELS, pd.Series(DONORS, index=np.arange(len(DONORS))[::-1]), n_folds=7)
    assert [fold.name for fold in found] == list("abcdefg")
    for fold in found:
        assert set(DONORS[fold.test]) == {fold.name}
        assert fold.name not in DONORS[fold.train]


def test_many_groups_are_joined_to_folds_of_similar_size():
    found = folds(LABELS, DONORS, n_folds=4)
    assert len(found) == 4
    assert sorted(len(fold.test) for fold in found) == [47, 50, 50, 50]
    for fold in found:
        assert not set(DONORS[fold.train]) & set(DONORS[fold.test])
        assert set(fold.name.split(", ")) == set(DONORS[fold.test])
    assert {fold.name for fold in folds(LABELS, DONORS, n_folds=2)} == {"a, d, f", "b, c and 2 more"}


@pytest.mark.parametrize(
    ("labels", "groups", "n_folds", "found"),
    [
        (["T"], None, 5, "1 cell"),
        (["T", "B"], None, 1, "1 fold"),
        (["T", "B"], ["a", "a"], 5, "all cells are of the group a"),
        (["T", "B", "B"], ["a", None, "b"], 5, "1 of 3 cells have no group"),
    ],
)
def test_what_cannot_be_split_is_said(labels, groups, n_folds, found):
    with pytest.raises(InputError, match=found):
        folds(labels, groups, n_folds=n_folds)
