from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from annformer.baselines import expression, highly_variable, log_normalised, scaled
from annformer.errors import InputError

N, N_GENES = 240, 300
MARKERS, BATCH_GENES = np.arange(40), np.arange(40, 80)


def counts(n_small: int = 120) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts with 40 genes that two types express differently and 40 that two batches do; cells of the second batch."""
    rng = np.random.default_rng(0)
    batch = np.arange(N) < n_small
    mean = np.tile(rng.gamma(2.0, 2.0, size=N_GENES), (N, 1))
    mean[np.ix_(np.arange(N) % 2 == 0, MARKERS)] *= 6
    mean[np.ix_(batch, BATCH_GENES)] *= 6
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32)), np.where(batch, "b", "a")


def test_log_normalised_is_what_scanpy_does():
    sc = pytest.importorskip("scanpy")
    x, _ = counts()
    cells = sc.AnnData(x.astype(np.float64))
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    assert np.allclose(log_normalised(x).toarray(), cells.X.toarray(), rtol=1e-5)
    assert log_normalised(x).dtype == np.float32


def test_a_cell_without_counts_stays_zero():
    assert (log_normalised(sp.csr_matrix((1, N_GENES))).toarray() == 0).all()


def test_scaled_is_what_scanpy_does():
    sc = pytest.importorskip("scanpy")
    dense = log_normalised(counts()[0]).toarray()
    dense[0, 0] = 1_000  # beyond the clip
    dense[:, 7] = 2  # does not vary
    found = scaled(sp.csr_matrix(dense))
    cells = sc.AnnData(dense.astype(np.float64))
    sc.pp.scale(cells, max_value=10)
    assert np.allclose(found, np.maximum(cells.X, -10), atol=1e-4)
    assert found.max() == 10
    assert (found[:, 7] == 0).all()


def test_genes_that_vary_within_batches_are_chosen_and_those_of_the_batch_are_not():
    pytest.importorskip("skmisc")
    x, batches = counts()
    found = highly_variable(x, batches, 40)
    assert found.note == ""
    assert found.genes.sum() == 40
    assert found.genes[MARKERS].mean() > 0.9
    assert found.genes[BATCH_GENES].mean() < 0.1
    assert highly_variable(x, None, 80).genes[BATCH_GENES].mean() > 0.7


def test_expected_counts_are_taken():
    pytest.importorskip("skmisc")
    x, batches = counts()
    found = highly_variable(x * np.float32(1.01), batches, 40)
    assert found.note == ""
    assert found.genes[MARKERS].mean() > 0.9


@pytest.mark.parametrize(
    ("n_small", "n_measured", "reason"),
    [(1, N_GENES, "batch b has 0 genes that vary"), (100, 3, "batch b has 3 genes that vary"), (100, 12, "seurat_v3 failed: ")],
    ids=["one cell", "three genes", "twelve genes"],
)
def test_where_the_regression_fails_another_flavour_chooses_and_the_note_says_so(n_small, n_measured, reason):
    pytest.importorskip("skmisc")
    x, batches = counts(n_small)
    seen = np.arange(N_GENES) < n_measured
    x = sp.csr_matrix(x.multiply(seen | (batches == "a")[:, None]))
    found = highly_variable(x, batches, 40)
    assert found.note.startswith("flavour seurat")
    assert reason in found.note
    assert found.genes.sum() == 40
    assert found.genes[MARKERS].mean() > 0.5


def test_without_scikit_misc_too(monkeypatch):
    monkeypatch.setattr(expression, "find_spec", lambda _: None)
    x, batches = counts()
    found = highly_variable(x, batches, 40)
    assert found.note == "flavour seurat (seurat_v3 needs scikit-misc, which is not installed)"
    assert found.genes[MARKERS].mean() > 0.6
    assert found.genes[BATCH_GENES].mean() < 0.1


def test_all_genes_where_there_are_no_more():
    x, batches = counts()
    found = highly_variable(x, batches, N_GENES)
    assert found.genes.all()
    assert "all 300 genes" in found.note


def test_genes_that_cannot_be_chosen_are_an_error_that_says_why(monkeypatch):
    def fail(*_):
        msg = "no variance\nat all"
        raise ValueError(msg)

    monkeypatch.setattr(expression, "_scanpy", fail)
    x, batches = counts()
    with pytest.raises(InputError, match="seurat failed: no variance;"):
        highly_variable(x, batches, 10)
