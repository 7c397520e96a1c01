"""Anchors: what a batch adds is taken out, what a type is stays, also where a batch lacks a type."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from annformer.tasks._alignment import aligned, find_anchors, neighbourhoods

N = 120


@pytest.fixture(scope="module")
def planted():
    """Three types far apart; the second batch lies elsewhere and lacks the last type. Batches, types, places, places without batch."""
    rng = np.random.default_rng(0)
    types = np.repeat([0, 1, 2, 0, 1], N)
    batches = np.repeat([0, 0, 0, 1, 1], N)
    centres = 6 * np.eye(3, 8)
    clean = centres[types] + 0.5 * rng.normal(size=(5 * N, 8))
    return batches, types, clean + batches[:, None] * 3 * np.eye(8)[5], clean


def distance_between(x, one, other) -> float:
    return float(np.linalg.norm(x[one].mean(0) - x[other].mean(0)))


def test_offsets_of_batches_are_taken_out(planted):
    batches, types, x, _ = planted
    after = aligned(x, batches, strength=2.0, seed=0)
    for kind in (0, 1):
        first, second = (types == kind) & (batches == 0), (types == kind) & (batches == 1)
        assert distance_between(x, first, second) > 2.5
        assert distance_between(after, first, second) < 0.6, "a sixth of 3, by the ridge"
    assert distance_between(after, types == 0, types == 1) > 6
    assert distance_between(after, types == 1, types == 2) > 6


def test_batches_that_meet_nowhere_are_brought_together(planted):
    batches, types, _, clean = planted
    far = clean + batches[:, None] * 40 * np.eye(8)[5]
    after = aligned(far, batches, strength=2.0, seed=0)
    gaps = [distance_between(after, (types == kind) & (batches == 0), (types == kind) & (batches == 1)) for kind in (0, 1)]
    assert max(gaps) < 10, "of 40"
    assert distance_between(after, types == 0, types == 1) > 5


def test_one_batch_stays_where_it_is(planted):
    _, _, x, _ = planted
    assert np.array_equal(aligned(x, np.zeros(len(x), int), strength=2.0, seed=0), x)


def test_cells_meet_their_like_of_the_other_batch_and_no_one_else(planted):
    batches, types, _, clean = planted
    places = neighbourhoods(clean, batches, n_neighbours=20, seed=0)
    alone = places[types == 2]  # a type that the other batch lacks
    towards = clean[types == 2].mean(0) / np.linalg.norm(clean[types == 2].mean(0))
    assert (alone @ towards / np.linalg.norm(alone, axis=1)).min() > 0.97
    spread = [places[types == kind].std(0).mean() for kind in range(3)]
    assert max(spread) < 0.6 * (clean / np.linalg.norm(clean, axis=1, keepdims=True))[types == 0].std(0).mean()


def test_anchors_are_the_same_again_and_padded(planted):
    batches, types, _, _ = planted
    rng = np.random.default_rng(1)
    level = rng.gamma(1.0, size=(3, 30))
    expression = sp.csr_array(np.log1p(rng.poisson(level[types] * (1 + 0.5 * batches[:, None]))).astype(np.float32))
    given = {"n_components": 40, "strength": 2.0, "n_neighbours": 20, "smoothing": 0.6, "seed": 3}
    found = find_anchors(expression, batches, **given)
    assert found.shape == (5 * N, 40) and not found[:, 29:].any() and np.isfinite(found).all()
    assert np.array_equal(found, find_anchors(expression, batches, **given))
    assert found[:, :29].std() == pytest.approx(1, abs=1e-4)
