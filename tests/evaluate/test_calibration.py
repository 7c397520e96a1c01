from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from annformer.evaluate import (
    calibrated_error,
    calibration_error_on_draws,
    coverage,
    coverage_interval,
    draws,
    expected_calibration_error,
    interval,
    novelty_auroc,
    novelty_auroc_on_draws,
    reliability,
)

N = 4_000
RNG = np.random.default_rng(0)
SAID = 0.5 + 0.5 * RNG.random(N) ** 0.5
CALIBRATED = RNG.random(N) < SAID
OVERCONFIDENT = RNG.random(N) < SAID - 0.15


def test_the_error_is_the_mean_distance_over_bins_of_equally_many_cells():
    said, right = SAID[:100], CALIBRATED[:100]
    bins = np.array_split(np.argsort(said), 10)
    expected = np.mean([abs(said[rows].mean() - right[rows].mean()) for rows in bins])
    assert expected_calibration_error(said, right, 10) == pytest.approx(expected)
    assert expected_calibration_error(said, right, 1) == pytest.approx(abs(said.mean() - right.mean()))


def test_perfect_and_wrong_confidence():
    assert expected_calibration_error(np.ones(50), np.ones(50, dtype=bool)) == 0
    assert expected_calibration_error(np.ones(50), np.zeros(50, dtype=bool)) == 1
    assert expected_calibration_error([0.5], [True]) == pytest.approx(0.5)


def test_the_order_of_cells_with_one_confidence_does_not_matter():
    said, right = np.repeat([0.6, 0.9], [120, 80]), np.arange(200) % 2 == 0
    expected = expected_calibration_error(said, right)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(200)
        assert expected_calibration_error(said[order], right[order]) == pytest.approx(expected)
    assert expected == pytest.approx(0.6 * 0.1 + 0.4 * 0.4)


def test_calibrated_confidences_lie_within_their_simulation_and_others_above():
    low_high = calibrated_error(SAID, n_simulations=200)
    assert low_high.low <= expected_calibration_error(SAID, CALIBRATED) <= low_high.high
    assert expected_calibration_error(SAID, OVERCONFIDENT) > 3 * low_high.high
    assert 0 < low_high.low < low_high.median < low_high.high
    fewer = calibrated_error(SAID[:200], n_simulations=200)
    assert fewer.median > 2 * low_high.median, "few cells show an error where there is none"
    assert calibrated_error(SAID, n_simulations=20, seed=1) != calibrated_error(SAID, n_simulations=20, seed=2)
    assert calibrated_error(np.ones(100), n_simulations=5) == (0, 0, 0)


def test_the_interval_of_the_error_is_that_of_the_drawn_cells():
    rows = list(draws(None, CALIBRATED, 100))
    found = calibration_error_on_draws(SAID, OVERCONFIDENT, iter(rows))
    assert found[7] == expected_calibration_error(SAID[rows[7]], OVERCONFIDENT[rows[7]])
    middle = interval(found)
    assert middle.low < 0.15 < middle.high
    assert (middle.low, middle.high) == tuple(np.quantile(found, [0.025, 0.975]))


def test_a_thousand_draws_of_thousands_of_cells_take_seconds():
    said = np.random.default_rng(0).random(12_000)
    start = time.process_time()
    calibration_error_on_draws(said, said > 0.5, draws(None, said > 0.5, 100))
    assert time.process_time() - start < 1


def test_reliability_counts_and_holds_the_calibrated():
    found = reliability(SAID, CALIBRATED, 12)
    assert found.n.sum() == N
    assert found.n.max() - found.n.min() <= 1
    assert found.confidence.is_monotonic_increasing
    assert np.average(found.correct, weights=found.n) == pytest.approx(CALIBRATED.mean())
    inside = found.confidence.between(found.low, found.high)
    assert inside.sum() >= 10
    assert not reliability(SAID, OVERCONFIDENT, 12).confidence.le(reliability(SAID, OVERCONFIDENT, 12).high).any()
    error = (found.n * (found.confidence - found.correct).abs()).sum() / N
    assert expected_calibration_error(SAID, CALIBRATED, 12) == pytest.approx(error)


def test_wilson_interval_of_a_known_case():
    found = reliability(np.full(10, 0.9), np.arange(10) < 8, 1).iloc[0]
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_fewer_cells_than_bins_have_a_bin_each():
    assert list(reliability([0.2, 0.9, 0.5], [False, True, True]).n) == [1, 1, 1]


def test_coverage_of_known_sets():
    sets = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    found = coverage(sets, np.array([0, 2, 1, -1]))
    assert found == {"coverage": 0.25, "mean_size": 1.5, "singletons": 0.25, "empty": 0.25}


def conformal(n_calibration: int, n: int, level: float, seed: int) -> float:
    """Coverage of split conformal sets: the classes whose probability is above a quantile of the true classes' probabilities."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(5, size=n_calibration + n)
    logits = rng.normal(size=(len(truth), 5))
    logits[np.arange(len(truth)), truth] += 2
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = 1 - chances[np.arange(n_calibration), truth[:n_calibration]]
    k = int(np.ceil((n_calibration + 1) * level))
    return coverage(1 - chances[n_calibration:] <= np.sort(scores)[k - 1], truth[n_calibration:])["coverage"]


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_sets_of_a_known_construction_are_covered_as_they_promise(level):
    low, high = coverage_interval(500, level)
    found = np.array([conformal(20_000, 500, level, seed) for seed in range(60)])
    assert ((found >= low) & (found <= high)).mean() >= 0.93
    assert found.mean() == pytest.approx(level, abs=0.01)
    wrong = np.array([conformal(20_000, 500, level - 0.1, seed) for seed in range(20)])
    assert (wrong < low).mean() > 0.9


def test_the_interval_of_the_coverage_is_binomial():
    low, high = coverage_interval(1_000, 0.9)
    share = np.random.default_rng(0).binomial(1_000, 0.9, 50_000) / 1_000
    assert ((share >= low) & (share <= high)).mean() == pytest.approx(0.99, abs=0.003)
    assert high - low < coverage_interval(100, 0.9)[1] - coverage_interval(100, 0.9)[0]


def test_novelty_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    new = rng.random(300) < 0.2
    for score in (rng.normal(size=300) + new, np.round(rng.normal(size=300) + new), np.zeros(300)):
        assert novelty_auroc(score, new) == pytest.approx(roc_auc_score(new, score))
    assert novelty_auroc(new.astype(float), new) == 1
    assert np.isnan(novelty_auroc([1.0, 2.0], [True, True]))


def test_novelty_auroc_on_draws_is_that_of_the_drawn_cells():
    rng = np.random.default_rng(0)
    new = rng.random(200) < 0.3
    score = np.round(rng.normal(size=200) + new, 1)
    rows = [rng.integers(200, size=200) for _ in range(20)]
    expected = [novelty_auroc(score[some], new[some]) for some in rows]
    np.testing.assert_allclose(novelty_auroc_on_draws(score, new, iter(rows)), expected)
    assert np.isnan(novelty_auroc_on_draws(score, new, [np.flatnonzero(new)])[0])


def test_the_interval_of_the_novelty_auroc_covers_the_true_one():
    rng, hit = np.random.default_rng(1), []
    true = 0.7602  # of two normal distributions that lie one standard deviation apart
    for _ in range(200):
        score = np.append(rng.normal(size=60) + 1, rng.normal(size=120))
        new = np.arange(180) < 60
        rows = list(draws(None, new, 300, seed=0))
        found = interval(novelty_auroc_on_draws(score, new, rows))
        hit.append(found.low <= true <= found.high)
    assert 0.9 <= np.mean(hit) <= 0.99


def test_what_is_no_probability_is_refused():
    for said in ([1.2], [np.nan], [-0.1]):
        with pytest.raises(AssertionError, match="probabilities"):
            expected_calibration_error(said, [True])
