"""The linear part: the exact solution in every kind of coordinates; strengths chosen by cells held back."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from annformer.tasks import _linear_part
from annformer.tasks._linear_part import LENGTH, fit_linear, fit_scaled


def problem(n, p, seed=0, k=3):
    rng = np.random.default_rng(seed)
    codes = rng.integers(k, size=n)
    x = rng.poisson(0.5, size=(n, p)).astype(np.float32)
    x[np.arange(n), codes] += 2
    return x, codes


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(_linear_part, "FLAT", 1e-6)


def scale_of(x):
    return LENGTH / np.sqrt(np.square(x).sum(axis=1).mean())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("n", "p"), [(60, 200), (200, 40)])
def test_it_is_the_logistic_regression_of_scikit_learn(n, p):
    x, codes = problem(n, p)
    found = fit_linear(sp.csr_matrix(x), codes, 3, np.arange(n) % 3, strengths=(0.01,), balance=0.0)
    theirs = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit(x * scale_of(x), codes)
    ours = found.linear.logits(sp.csr_matrix(x)) / found.factor
    expected = theirs.predict_log_proba(x * scale_of(x))
    np.testing.assert_allclose(ours - np.logaddexp.reduce(ours, axis=1, keepdims=True), expected, atol=5e-3)


@pytest.mark.parametrize(("n", "p"), [(60, 200), (200, 40), (400, 1000)])
def test_it_stops_where_probabilities_hardly_change(monkeypatch, n, p):
    x, codes = problem(n, p)
    said = []
    for flat in (_linear_part.FLAT, 1e-6):
        monkeypatch.setattr(_linear_part, "FLAT", flat)
        found = fit_linear(sp.csr_matrix(x), codes, 3, np.arange(n) % 3, strengths=(0.001, 0.01), balance=0.0)
        said.append(np.exp(log_softmax(found.out_of_fold / found.factor, axis=1)))
    assert np.abs(said[0] - said[1]).max() < 0.02
    assert (said[0].argmax(axis=1) != said[1].argmax(axis=1)).mean() < 0.02


def test_types_of_few_cells_are_called_under_a_weak_penalty():
    rng = np.random.default_rng(0)
    codes = np.sort(np.r_[np.repeat([0, 1], 400), np.repeat([2, 3], 6)])
    x = rng.poisson(0.5, size=(len(codes), 300)).astype(np.float32)
    for code in range(4):
        x[codes == code, 10 * code : 10 * code + 10] += 2
    found = fit_linear(sp.csr_matrix(x), codes, 4, np.arange(len(codes)) % 3, strengths=(0.1, 30.0), balance=0.5)
    called = found.out_of_fold.argmax(axis=1)
    assert (called[codes >= 2] == codes[codes >= 2]).mean() > 0.8
    assert (called[codes < 2] == codes[codes < 2]).mean() > 0.98


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("n", "p"), [(60, 200), (200, 40)])
def test_features_that_are_dense_or_sparse_or_too_many_give_the_same(monkeypatch, n, p):
    x, codes = problem(n, p)
    kinds = {"dense": x, "sparse": sp.csr_matrix(x)}
    logits = {name: fit_linear(kind, codes, 3, np.arange(n) % 3, strengths=(0.01,), balance=0.5) for name, kind in kinds.items()}
    monkeypatch.setattr(_linear_part, "FEW", 10)
    logits["too many"] = fit_linear(kinds["sparse"], codes, 3, np.arange(n) % 3, strengths=(0.01,), balance=0.5)
    expected = centred(logits["dense"].linear.logits(x))
    for found in logits.values():
        np.testing.assert_allclose(centred(found.linear.logits(x)), expected, atol=2e-2)
        np.testing.assert_allclose(centred(found.out_of_fold), centred(logits["dense"].out_of_fold), atol=2e-2)


def centred(logits):
    return logits - logits.mean(axis=1, keepdims=True)


def test_a_held_back_cell_takes_no_part_in_what_is_said_of_it():
    x, codes = problem(60, 100)
    folds = np.arange(60) % 3
    before = fit_linear(x, codes, 3, folds, strengths=(0.01,), balance=0.0)
    changed = codes.copy()
    changed[folds == 0] = (changed[folds == 0] + 1) % 3
    after = fit_linear(x, changed, 3, folds, strengths=(0.01,), balance=0.0)
    said = [found.out_of_fold / found.factor for found in (before, after)]
    np.testing.assert_allclose(said[1][folds == 0], said[0][folds == 0], atol=1e-6)
    assert np.abs(said[1][folds == 1] - said[0][folds == 1]).max() > 0.01


def test_noise_asks_for_a_strong_penalty_and_signal_for_a_weak_one():
    x, codes = problem(120, 300)
    strengths = (1e-4, 1e-2, 1.0)
    signal = fit_linear(x, codes, 3, np.arange(120) % 4, strengths=strengths, balance=0.0)
    noise = fit_linear(x, np.random.default_rng(1).permutation(codes), 3, np.arange(120) % 4, strengths=strengths, balance=0.0)
    assert noise.strength == 1e-4 < signal.strength


def test_logits_are_as_sure_as_held_back_cells_allow():
    x, codes = problem(300, 60)
    timid = fit_linear(x, codes, 3, np.arange(300) % 4, strengths=(1e-4,), balance=0.0)
    assert timid.factor > 2
    probabilities = np.exp(timid.out_of_fold - np.logaddexp.reduce(timid.out_of_fold, axis=1, keepdims=True))
    right = probabilities.argmax(axis=1) == codes
    assert abs(probabilities.max(axis=1).mean() - right.mean()) < 0.03


def test_scaled_features_are_read_from_all_features():
    x, codes = problem(200, 60)
    x[:, 7] = 3.0  # never varies
    columns = np.array([0, 1, 2, 7, 20])
    found = fit_scaled(sp.csr_matrix(x), columns, codes, 3, np.arange(200) % 4, strengths=(0.1,))
    some = x[:, columns]
    scaled = some[:, :3] / some[:, :3].std(axis=0)
    scaled = np.c_[scaled, some[:, 4:] / some[:, 4:].std(axis=0)]
    alone = fit_linear(sp.csr_matrix(scaled.astype(np.float32)), codes, 3, np.arange(200) % 4, strengths=(0.1,), balance=1.0)
    np.testing.assert_allclose(centred(found.linear.logits(sp.csr_matrix(x))), centred(alone.linear.logits(scaled)), atol=2e-2)
    assert not found.linear.weight[np.setdiff1d(np.arange(60), [0, 1, 2, 20])].any()
    assert found.linear.mean.shape == (60,)


def test_balance_calls_rare_types_more():
    rng = np.random.default_rng(0)
    codes = (rng.random(400) < 0.08).astype(int)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    x[:, 0] += codes
    called = [
        (fit_linear(x, codes, 2, np.arange(400) % 4, strengths=(1.0,), balance=balance).linear.logits(x).argmax(1) == 1).mean()
        for balance in (0.0, 1.0)
    ]
    assert called[0] < 0.05 < called[1]


@pytest.mark.usefixtures("exact")
def test_products_that_float32_gets_wrong_are_made_good(monkeypatch):
    x, codes = problem(60, 200)
    expected = fit_linear(sp.csr_matrix(x), codes, 3, np.arange(60) % 3, strengths=(0.01,), balance=0.0)
    monkeypatch.setattr(_linear_part, "JITTER", 1e-12)  # far less than what is wrong
    twice = np.vstack((x, x))  # half of the directions are nothing but that
    found = fit_linear(sp.csr_matrix(twice), np.r_[codes, codes], 3, np.arange(120) % 60 % 3, strengths=(0.005,), balance=0.0)
    said = [centred(one.linear.logits(x)) / one.factor for one in (found, expected)]
    np.testing.assert_allclose(*said, atol=0.02)


def test_a_type_that_a_fold_lacks_is_unlikely_there():
    x, codes = problem(60, 30)
    codes[codes == 2] = 0
    codes[0] = 2
    found = fit_linear(x, codes, 3, np.arange(60) % 3, strengths=(0.01,), balance=0.0)
    assert np.isfinite(found.out_of_fold).all()
    assert (found.out_of_fold[::3].argmax(axis=1) != 2).all()
