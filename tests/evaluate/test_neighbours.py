from __future__ import annotations

import numpy as np
import pytest

from annformer.evaluate import expression_strata, neighbour_scores, partner_ranks

N = 400


def embedding(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, 16))


def strata() -> np.ndarray:
    return np.arange(N) % 10


def test_a_planted_family_is_found_and_a_random_one_is_not():
    genes = embedding()
    family = [3, 50, 120, 301]
    genes[family] = genes[3] + 0.1 * np.random.default_rng(1).normal(size=(4, 16))
    table = neighbour_scores(genes, {"family": family, "strangers": [7, 90, 200, 333]}, strata=strata(), n_draws=500).set_index("set")
    assert table.loc["family", "median_rank"] == table.loc["family", "best_rank"] == 2
    assert table.loc["family", "p"] == pytest.approx(1 / 501)
    assert table.loc["family", "n_genes"] == 4
    assert table.loc["strangers", "p"] > 0.01
    assert table["null_rank"].between(0.4 * N, 0.6 * N).all()


def test_p_is_uniform_where_nothing_is_planted():
    rng = np.random.default_rng(2)
    sets = {str(i): rng.choice(N, 3, replace=False) for i in range(60)}
    p = neighbour_scores(embedding(), sets, strata=strata(), n_draws=200)["p"]
    assert 0.4 < p.mean() < 0.6
    assert (p < 0.05).mean() <= 0.15


def test_likeness_that_only_comes_from_expression_is_not_taken_for_a_family():
    genes, level = embedding(), strata()
    genes += 3 * embedding(5)[level]  # genes of a stratum lie together
    members = np.flatnonzero(level == 4)[:4]
    matched = neighbour_scores(genes, {"set": members}, strata=level, n_draws=300)
    blind = neighbour_scores(genes, {"set": members}, strata=np.zeros(N, dtype=int), n_draws=300)
    assert blind["p"].iloc[0] < 0.01
    assert matched["p"].iloc[0] > 0.05


def test_ranks_by_hand():
    genes = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.5], [0.0, 1.0], [-1.0, 0.0]])
    ranks = partner_ranks(genes, np.array([0, 2, 4]))
    assert ranks.tolist() == [[0, 2, 4], [2, 0, 4], [4, 2, 0]]


def test_strata_are_equally_large_and_ordered():
    expression = np.random.default_rng(0).exponential(size=100)
    found = expression_strata(expression, 10)
    assert np.bincount(found).tolist() == [10] * 10
    assert found[expression.argmax()] == 9
    assert found[expression.argmin()] == 0


def test_a_set_needs_two_different_genes():
    with pytest.raises(AssertionError, match="two different genes"):
        neighbour_scores(embedding(), {"twins": [1, 1]}, strata=strata())
