from __future__ import annotations

import numpy as np
import pytest

from annformer.errors import InputError
from annformer.evaluate import leave_out_annotation, summarise

LABELS = np.repeat(["B", "NK", "T"], [40, 20, 20])


def planted(seed: int = 0, spread: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0, 3.0], [3, 0, 0], [0, 3, 0]])
    return centres[np.unique(LABELS, return_inverse=True)[1]] + spread * rng.normal(size=(80, 3))


@pytest.fixture(scope="module")
def scores():
    noise = np.random.default_rng(1).normal(size=(80, 3))
    return leave_out_annotation({"planted": planted(), "noise": noise}, LABELS, seeds=(0, 1, 2))


def test_planted_signal_is_found_and_noise_is_not(scores):
    means = summarise(scores).set_index(["representation", "classifier"])
    for classifier in ("kNN (k=10)", "logistic regression"):
        assert means.loc[("planted", classifier), "macro_f1"] > 0.95
        assert means.loc[("noise", classifier), "macro_f1"] < 0.55


def test_majority_class_is_the_floor(scores):
    floor = scores[scores.representation == "(none)"]
    assert len(floor) == 3
    assert np.allclose(floor.accuracy, 0.5)
    assert np.allclose(floor.macro_f1, (2 / 3) / 3)


def test_scale_of_a_representation_does_not_matter():
    small = leave_out_annotation({"x": planted() * 1e-4}, LABELS, seeds=(0,))
    large = leave_out_annotation({"x": planted()}, LABELS, seeds=(0,))
    assert np.allclose(small.accuracy, large.accuracy)


def test_same_seed_same_scores_and_other_seed_other_split():
    noisy = planted(spread=2.0)
    first = leave_out_annotation({"x": noisy}, LABELS, seeds=(0, 1))
    assert first.equals(leave_out_annotation({"x": noisy}, LABELS, seeds=(0, 1)))
    assert first[first.seed == 0].accuracy.tolist() != first[first.seed == 1].accuracy.tolist()


def test_a_label_of_one_cell_is_named():
    labels = LABELS.copy()
    labels = labels.astype("U5")
    labels[0] = "pDC"
    with pytest.raises(InputError, match="pDC"):
        leave_out_annotation({"x": planted()}, labels)
