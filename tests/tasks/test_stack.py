"""The stack: weights, temperature, tilt and sets, all by held-back cells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import softmax

from annformer.tasks._novelty import fit_novelty
from annformer.tasks._stack import Abroad, fit_stack


def planted(n, seed=0, shares=(0.7, 0.25, 0.05)):
    """Cells of known probabilities, and logits that say them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, len(shares))) * 2 + np.log(shares)
    probabilities = softmax(logits, axis=1)
    codes = (probabilities.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return logits, codes


def test_what_is_too_sure_is_tempered():
    logits, codes = planted(4000)
    stack = fit_stack([3 * logits], codes, np.bincount(codes))
    assert stack.weights[0] == pytest.approx(1 / 3, rel=0.1)


def test_a_part_that_guesses_gets_no_weight():
    logits, codes = planted(4000)
    guess = np.random.default_rng(5).normal(size=logits.shape)
    stack = fit_stack([guess, logits], codes, np.bincount(codes))
    assert stack.weights[0] < 0.1 < 0.9 < stack.weights[1]


def test_parts_that_know_different_things_are_both_used():
    logits, codes = planted(4000)
    noise = np.random.default_rng(5).normal(size=(2, *logits.shape))
    parts = [logits + noise[0], logits + noise[1]]
    stack = fit_stack(parts, codes, np.bincount(codes))
    assert min(stack.weights) > 0.2
    right = (stack.log_probabilities(parts).argmax(1) == codes).mean()
    assert right > max((part.argmax(1) == codes).mean() for part in parts)


def test_what_parts_are_worth_is_told_by_cells_that_differ_and_how_sure_to_be_by_cells_alike():
    logits, codes = planted(4000)
    noise = np.random.default_rng(5).normal(size=(2, *logits.shape))
    fragile = [logits + noise[0], 3 * logits]  # knows all of cells alike, and nothing of others
    abroad = [logits + noise[0], np.random.default_rng(6).normal(size=logits.shape)]
    naive = fit_stack(fragile, codes, np.bincount(codes))
    assert naive.weights[1] > 0.2
    robust = fit_stack(fragile, codes, np.bincount(codes), abroad=Abroad(abroad, np.arange(len(codes))))
    assert robust.weights[1] / robust.weights[0] < naive.weights[1] / naive.weights[0] / 2
    logs = robust.log_probabilities(fragile)
    sure = np.exp(logs.max(axis=1)).mean()
    assert sure == pytest.approx((logs.argmax(axis=1) == codes).mean(), abs=0.05), "as sure as cells alike allow"


def test_rare_types_are_called_more_readily_where_that_helps():
    logits, codes = planted(6000)
    stack = fit_stack([logits], codes, np.bincount(codes))
    assert (stack.tilt <= 0).all() and stack.tilt.argmin() == 2 and stack.tilt[2] < -0.2
    logs = stack.log_probabilities([logits])
    assert (stack.called(logs) == 2).sum() > (logs.argmax(1) == 2).sum()


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_sets_cover_new_cells_exactly(coverage):
    hits = []
    for seed in range(20):
        logits, codes = planted(300, seed)
        stack = fit_stack([logits], codes, np.bincount(codes, minlength=3))
        new, truth = planted(300, seed + 100)
        sets = stack.sets(stack.log_probabilities([new]), coverage)
        hits.append(sets[np.arange(300), truth].mean())
    assert np.mean(hits) == pytest.approx(coverage, abs=0.015)


def test_fewer_cells_than_the_coverage_needs_give_full_sets():
    logits, codes = planted(20)
    stack = fit_stack([logits], codes, np.bincount(codes, minlength=3))
    assert stack.sets(stack.log_probabilities([logits]), 0.99).all()


def test_perfect_parts_do_not_make_it_certain_of_everything():
    _, codes = planted(200)
    stack = fit_stack([np.eye(3)[codes] * 5], codes, np.bincount(codes, minlength=3))
    assert stack.weights[0] <= 3


def told_apart(centres: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Cells around the centres of their types."""
    return sp.csr_matrix((centres[codes] + rng.normal(size=(len(codes), centres.shape[1]))).astype(np.float32))


def test_novelty_is_a_percentile_of_known_cells_and_high_for_others():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 40)) * 4
    codes, rows = rng.integers(3, size=2000), np.arange(2000)
    found = fit_novelty([told_apart(centres, codes, rng)], codes, 3, rows % 5, rows, rng.random(2000) - 1)
    of_known = told_apart(centres, rng.integers(3, size=2000), rng)
    new_known = found.of([found.spaces[0].distance(of_known)], rng.random(2000) - 1)
    assert abs((new_known > 0.9).mean() - 0.1) < 0.04
    elsewhere = sp.csr_matrix((rng.normal(size=(50, 40)) * 4 + rng.normal(size=(50, 40))).astype(np.float32))
    new = found.of([found.spaces[0].distance(elsewhere)], rng.random(50) - 1)
    assert np.median(new) > 0.85


def test_a_type_that_only_the_network_tells_apart_is_novel():
    rng = np.random.default_rng(0)
    centres, states = rng.normal(size=(3, 40)) * 4, rng.normal(size=(4, 16)) * 6
    codes, folds, rows = rng.integers(3, size=600), np.arange(600) % 5, np.arange(600)
    expression, network = told_apart(centres, codes, rng), told_apart(states, codes, rng).toarray()
    without, both = (fit_novelty(views, codes, 3, folds, rows, rng.random(600)) for views in ([expression], [expression, network]))
    looks_like = rng.integers(3, size=50)
    there = told_apart(centres, looks_like, rng), told_apart(states, np.full(50, 3), rng).toarray()
    doubt = rng.random(50)
    distances = [space.distance(cells) for space, cells in zip(both.spaces, there, strict=True)]
    assert abs(np.median(without.of(distances[:1], doubt)) - 0.5) < 0.2
    assert np.median(both.of(distances, doubt)) > 0.8


def test_one_way_alone_makes_a_cell_unassigned():
    rng = np.random.default_rng(0)
    centres, states = rng.normal(size=(3, 40)) * 4, rng.normal(size=(3, 16)) * 6
    codes, rows = rng.integers(3, size=600), np.arange(600)
    views = [told_apart(centres, codes, rng), told_apart(states, codes, rng).toarray()]
    found = fit_novelty(views, codes, 3, rows % 5, rows, rng.random(600) * 0.5)
    typical = [np.full(1, np.median(column)) for column in found.known.T]
    assert found.of(typical[:2], typical[2])[0] < 0.6
    for way in range(2):
        far = [*typical]
        far[way] = far[way] * 5
        assert found.of(far[:2], far[2])[0] > 0.99
