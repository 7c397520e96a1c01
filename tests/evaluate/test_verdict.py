from __future__ import annotations

import numpy as np
import pytest

from annformer.evaluate import draws, integration_parts, verdict
from annformer.evaluate.verdict import widening

TYPES = np.repeat(["B", "NK", "T"], [100, 60, 40])
DONORS = np.tile(["a", "b", "c", "d", "e"], 40)


def test_a_planted_difference_beats_loses_and_ties():
    rng = np.random.default_rng(0)
    floor = rng.normal(0.6, 0.02, size=1_000)
    won = verdict(floor + rng.normal(0.05, 0.01, size=1_000), floor)
    assert (won.word, verdict(floor, floor + 0.05).word, verdict(floor, floor).word) == ("beats", "loses", "ties")
    assert won.difference == pytest.approx(0.05, abs=0.002)
    assert (won.low, won.high) == pytest.approx((0.05 - 0.0196, 0.05 + 0.0196), abs=0.003)
    assert verdict(floor + rng.normal(0.005, 0.01, size=1_000), floor).word == "ties"


def test_the_difference_is_paired():
    level = np.random.default_rng(0).normal(0.6, 0.2, size=500)  # the draws differ much, the methods little and always alike
    assert verdict(level + 0.001, level).word == "beats"


def test_an_undefined_score_has_no_verdict():
    with pytest.raises(AssertionError):
        verdict(np.array([0.1, np.nan]), np.array([0.1, 0.1]))


def test_five_donors_are_drawn_whole():
    for rows in draws(DONORS, TYPES, 20):
        times = np.bincount(rows, minlength=200).reshape(-1, 5)
        assert (times == times[0]).all()
        assert times[0].sum() == 5


@pytest.mark.parametrize("units", [None, np.where(DONORS == "e", "a", DONORS)], ids=["no donors", "four donors"])
def test_of_fewer_donors_the_cells_are_drawn_within_their_type(units):
    for rows in draws(units, TYPES, 20):
        assert (TYPES[rows] == TYPES).all()
        assert len(np.unique(rows)) < 200


def test_cells_without_a_type_are_drawn_among_themselves():
    labels = TYPES.astype(object)
    labels[:30] = None
    assert all((rows < 30).sum() == 30 for rows in draws(None, labels, 5))


def test_the_seed_decides_the_draws():
    first, again, other = (np.array(list(draws(DONORS, TYPES, 5, seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def false_verdicts(n_units: int | None, *, told: bool = True, n_tried: int = 1_500) -> float:
    """Share of verdicts other than "ties" on two equal methods; cells of a donor err together."""
    rng, n = np.random.default_rng(3), n_units or 200
    donors = None if n_units is None else np.repeat(np.arange(n), 3)
    n_cells = n if donors is None else 3 * n
    times = np.array([np.bincount(rows, minlength=n_cells) for rows in draws(donors, np.zeros(n_cells), 400)])
    noise = rng.normal(size=(n_cells, n_tried)) if donors is None else rng.normal(size=(n, n_tried))[donors]
    means = times @ noise / n_cells
    words = [verdict(mean, np.zeros(400), n_units if told else None).word for mean in means.T]
    assert abs(words.count("beats") - words.count("loses")) < 0.05 * n_tried
    return 1 - words.count("ties") / n_tried


@pytest.mark.parametrize("n_units", [None, 5, 8, 40], ids=["cells", "5 donors", "8 donors", "40 donors"])
def test_equal_methods_tie_about_as_often_as_the_interval_says(n_units):
    assert 0.03 <= false_verdicts(n_units) <= 0.07


def test_without_the_number_of_donors_five_would_often_tell_equal_methods_apart():
    assert false_verdicts(5, told=False) > 0.12


def test_few_donors_make_the_interval_wider_about_its_middle():
    difference = np.random.default_rng(0).gamma(2, size=500)
    cells, donors = verdict(difference, np.zeros(500)), verdict(difference, np.zeros(500), 5)
    middle = difference.mean()
    assert donors.difference == cells.difference == pytest.approx(middle)
    assert middle - donors.low == pytest.approx(1.584 * (middle - cells.low), rel=1e-3)
    assert donors.high - middle == pytest.approx(1.584 * (cells.high - middle), rel=1e-3)
    assert widening(1_000_000) == pytest.approx(1, abs=1e-5)


def representation(signal: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return signal * np.eye(3)[np.unique(TYPES, return_inverse=True)[1]] + rng.normal(size=(200, 3))


def bootstrap(values: np.ndarray, labels: np.ndarray, score: str) -> np.ndarray:
    parts = integration_parts(values, labels, DONORS)
    return np.array([parts.scores(rows)[score] for rows in draws(DONORS, labels, 200)])


def test_a_representation_with_signal_beats_one_without_and_shuffled_labels_tie():
    pytest.importorskip("scib_metrics")
    pytest.importorskip("igraph")
    ours, floor = representation(6, 0), representation(0, 1)
    assert verdict(bootstrap(ours, TYPES, "overall"), bootstrap(floor, TYPES, "overall")).word == "beats"
    assert verdict(bootstrap(floor, TYPES, "avg_bio"), bootstrap(ours, TYPES, "avg_bio")).word == "loses"
    shuffled = np.random.default_rng(2).permutation(TYPES)
    control = verdict(bootstrap(ours, shuffled, "ari"), bootstrap(floor, shuffled, "ari"))
    assert control.word == "ties"
    assert abs(control.difference) < 0.05
