from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from annformer.baselines import VisibleGeneRidge, gene_means

N_GENES, SHARE = 40, 0.5


def planted(n_cells: int, seed: int, signal: float = 1.0) -> tuple[sp.csr_array, sp.csr_array]:
    """Cells of which two hidden factors move all genes; half of the genes of a cell are visible, a third is not expressed."""
    rng = np.random.default_rng(seed)
    loadings = np.random.default_rng(99).normal(size=(2, N_GENES))
    values = 25 + 8 * signal * rng.normal(size=(n_cells, 2)) @ loadings + 2 * rng.normal(size=(n_cells, N_GENES))
    drawn = rng.random(values.shape)
    return tuple(sp.csr_array(np.where(where, values, 0.0)) for where in (drawn < 1 / 3, drawn > 2 / 3))


def squared_errors(ridge: VisibleGeneRidge, visible: sp.csr_array, asked: sp.csr_array) -> tuple[float, float]:
    """Mean squared error of the ridge, and of the genes' means."""
    cells, genes = asked.nonzero()
    truth = asked.tocoo().data
    return float(np.mean((ridge.predict(visible, cells, genes) - truth) ** 2)), float(np.mean((ridge.means_[genes] - truth) ** 2))


def test_planted_dependence_is_found():
    ridge = VisibleGeneRidge(ranks=(30,), strengths=(0.01, 0.1, 1.0, 10.0)).fit(*planted(2_000, 0), held_out=planted(200, 1))
    ours, mean = squared_errors(ridge, *planted(300, 2))
    assert ours < 0.4 * mean


def test_without_dependence_the_strongest_penalty_is_chosen_and_costs_nothing():
    strengths = (0.001, 1.0, 1e6)
    ridge = VisibleGeneRidge(ranks=(30,), strengths=strengths).fit(*planted(300, 0, signal=0.0), held_out=planted(300, 1, signal=0.0))
    assert ridge.strength_ == 1e6
    assert ridge.errors_[30, 1e6] < ridge.errors_[30, 0.001]
    ours, mean = squared_errors(ridge, *planted(300, 2, signal=0.0))
    assert ours == pytest.approx(mean, rel=0.01)


def test_the_rank_that_is_needed_is_chosen():
    ranks = (1, 30)
    ridge = VisibleGeneRidge(ranks=ranks, strengths=(0.01, 1.0)).fit(*planted(2_000, 0), held_out=planted(200, 1))
    assert ridge.rank_ == 30  # two factors do not fit into one direction
    assert set(ridge.errors_) == {(rank, strength) for rank in ranks for strength in (0.01, 1.0)}
    assert ridge.errors_[30, ridge.strength_] == min(ridge.errors_.values())
    alone = VisibleGeneRidge(ranks=(30,), strengths=(ridge.strength_,)).fit(*planted(2_000, 0))
    assert squared_errors(ridge, *planted(300, 2)) == pytest.approx(squared_errors(alone, *planted(300, 2)))
    few = VisibleGeneRidge(ranks=(1,), strengths=(1.0,)).fit(*planted(2_000, 0))
    assert squared_errors(few, *planted(300, 2))[0] > 1.2 * squared_errors(ridge, *planted(300, 2))[0]


@pytest.mark.parametrize("n_cells", [25, 400])  # fewer and more cells than components: both systems of equations
def test_weights_are_those_of_the_ridge_in_closed_form(n_cells):
    visible, asked = planted(n_cells, 0)
    ridge = VisibleGeneRidge(ranks=(20,), strengths=(0.7,), smoothing=2.0).fit(visible, asked)
    z = ridge._project(visible).astype(np.float64)
    for gene in (0, 17):
        cells = asked[:, [gene]].nonzero()[0]
        y = asked.toarray()[cells, gene] - ridge.means_[gene]
        expected = np.linalg.solve(z[cells].T @ z[cells] + 0.7 * np.eye(20), z[cells].T @ y)
        assert np.allclose(ridge.weights_[gene], expected, atol=1e-4 * np.abs(expected).max())


def test_the_asked_values_of_a_cell_do_not_reach_its_input():
    visible, asked = planted(200, 0)
    ridge = VisibleGeneRidge(ranks=(10,)).fit(visible, asked)
    cells, genes = asked.nonzero()
    before = ridge.predict(visible, cells, genes)
    asked.data[:] = -1e9
    assert np.array_equal(ridge.predict(visible, cells, genes), before)


def test_a_gene_that_was_never_asked_gets_its_mean_and_an_unknown_one_the_mean_of_all():
    visible, asked = planted(200, 0)
    both = sp.csr_array(visible + asked)
    visible = sp.csr_array(sp.hstack([visible, asked[:, [3]], sp.csr_array((200, 1))]))  # gene 40: visible only; 41: nowhere
    asked = sp.csr_array(sp.hstack([asked, sp.csr_array((200, 2))]))
    ridge = VisibleGeneRidge(ranks=(10,), smoothing=0.0).fit(visible, asked)
    said = ridge.predict(visible, np.array([0, 0]), np.array([40, 41]))
    everything = np.concatenate([both.data, visible[:, [40]].data])
    assert said == pytest.approx([visible[:, [40]].data.mean(), everything.mean()])


def test_smoothing_pulls_rare_genes_towards_the_mean_of_all():
    means = gene_means(np.array([0, 0, 0, 1]), np.array([2.0, 2.0, 2.0, 10.0]), 3, smoothing=1.0)
    assert means.tolist() == [(6 + 4) / 4, (10 + 4) / 2, 4.0]
