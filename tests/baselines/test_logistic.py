from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from annformer.baselines import logistic
from annformer.baselines.logistic import choose, coordinates, fit, probabilities


def cells(n: int, n_genes: int, n_types: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Types of unequal numbers that overlap."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(n_types, n, p=np.arange(1, n_types + 1) / (n_types * (n_types + 1) / 2))
    centres = np.random.default_rng(99).normal(0, 0.35, (n_types, n_genes))
    return (rng.normal(size=(n, n_genes)) * np.linspace(0.2, 2, n_genes) + centres[codes] + 3).astype(np.float32), codes


@pytest.mark.parametrize(("n", "n_genes"), [(90, 300), (300, 60)], ids=["fewer cells than genes", "more cells than genes"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("inverse_penalty", [0.003, 1.0])
def test_the_solution_is_that_of_scikit_learn_on_all_genes(n, n_genes, balanced, inverse_penalty):
    (known, codes), (asked, _) = cells(n, n_genes, 4), cells(50, n_genes, 4, seed=1)
    theirs = LogisticRegression(C=inverse_penalty, class_weight="balanced" if balanced else None, tol=1e-9, max_iter=10_000)
    expected = theirs.fit(known.astype(np.float64), codes).predict_proba(asked)
    at = coordinates(known, asked)
    weights = fit(at.reference, codes, 4, inverse_penalty, at.size, balanced=balanced)
    assert probabilities(at.query, weights, 4) == pytest.approx(expected, abs=2e-3)
    assert at.reference.shape[1] <= min(n, n_genes)


def test_two_types_have_the_solution_of_scikit_learn_for_twice_the_inverse_penalty():
    (known, codes), (asked, _) = cells(90, 200, 2), cells(50, 200, 2, seed=1)
    expected = LogisticRegression(C=0.02, tol=1e-9, max_iter=10_000).fit(known.astype(np.float64), codes).predict_proba(asked)
    at = coordinates(known, asked)
    assert probabilities(at.query, fit(at.reference, codes, 2, 0.01, at.size), 2) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("n", "n_genes"), [(60, 200), (200, 60)])
def test_coordinates_keep_dot_products(n, n_genes, monkeypatch):
    (known, _), (asked, _) = cells(n, n_genes, 3), cells(40, n_genes, 3, seed=1)
    centred, others = known - known.mean(axis=0), asked - known.mean(axis=0)
    for largest in (logistic.LARGEST_GRAM, 10):
        monkeypatch.setattr(logistic, "LARGEST_GRAM", largest)
        at = coordinates(known, asked)
        assert np.allclose(at.reference @ at.reference.T, centred @ centred.T, atol=0.02)
        assert np.allclose(at.query @ at.reference.T, others @ centred.T, atol=0.02)
        assert np.allclose(at.size, (at.reference.astype(np.float64) ** 2).sum(axis=0), rtol=1e-3)


def test_where_it_starts_does_not_matter():
    known, codes = cells(90, 200, 3)
    at = coordinates(known, known)
    first = fit(at.reference, codes, 3, 0.01, at.size)
    far = np.random.default_rng(0).normal(size=first.shape)
    again = fit(at.reference, codes, 3, 0.01, at.size, start=far)
    assert probabilities(at.query, again, 3) == pytest.approx(probabilities(at.query, first, 3), abs=2e-3)


@pytest.mark.parametrize(("noise", "expected"), [(1.0, "strong"), (0.0, "weak")])
def test_noise_asks_for_a_strong_penalty(noise, expected):
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [100, 60, 40])
    known = rng.normal(size=(200, 400)).astype(np.float32)
    known[np.arange(200), codes] += 4
    moved = rng.random(200) < 0.35 * noise
    codes[moved] = rng.integers(3, size=int(moved.sum()))
    known[:, :3] *= 3 if noise else 0.8
    found = choose(coordinates(known, known), codes, balanced=False, seed=0)
    tried = [strength * 200 / float(coordinates(known, known).size.sum()) for strength in logistic.STRENGTHS]
    place = int(np.argmin(np.abs(np.log(np.array(tried) / found.inverse_penalty))))
    assert place <= 1 if expected == "strong" else place >= 1
    assert found.score == choose(coordinates(known, known), codes, balanced=False, seed=0).score


def test_random_labels_score_at_chance_inside_the_reference():
    known, _ = cells(300, 100, 3)
    codes = np.random.default_rng(5).integers(3, size=300)
    assert choose(coordinates(known, known), codes, balanced=False, seed=0).score == pytest.approx(1 / 3, abs=0.1)


def test_folds_spread_every_type():
    codes = np.repeat([0, 1, 2], [50, 4, 1])
    fold = logistic.folds(codes, 0)
    for code, fewest in ((0, 16), (1, 1), (2, 0)):
        assert np.bincount(fold[codes == code], minlength=3).min() >= fewest
    assert not np.array_equal(fold, logistic.folds(codes, 1))


def test_cells_that_are_all_alike_have_the_shares_of_the_types():
    known, codes = np.ones((30, 50), dtype=np.float32), np.repeat([0, 1], [20, 10])
    at = coordinates(known, known)
    found = choose(at, codes, balanced=False, seed=0)
    said = probabilities(at.query, fit(at.reference, codes, 2, found.inverse_penalty, at.size), 2)
    assert said == pytest.approx(np.tile([2 / 3, 1 / 3], (30, 1)), abs=1e-3)
