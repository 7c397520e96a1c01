from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from annformer.baselines import gene_means, pca_embedding


def test_pca_of_sparse_and_dense_cells_agree_with_the_svd():
    expression = np.random.default_rng(0).poisson(1.0, (40, 30)).astype(np.float32)
    sparse, dense = pca_embedding(sp.csr_array(expression), n_components=5), pca_embedding(expression, n_components=5)
    values = np.linalg.svd(expression - expression.mean(axis=0), compute_uv=False)[:5]
    assert np.allclose(np.linalg.norm(dense, axis=0), values, rtol=1e-4)
    assert np.allclose(np.abs(sparse), np.abs(dense), atol=1e-3)
    assert sparse.dtype == np.float32


def test_pca_takes_what_components_there_are():
    assert pca_embedding(np.random.default_rng(0).random((6, 20)), n_components=50).shape == (6, 5)


def test_gene_means_and_the_mean_of_all_for_a_gene_never_met():
    means = gene_means(np.array([0, 0, 2]), np.array([1.0, 3.0, 8.0]), 4)
    assert means.tolist() == [2.0, 4.0, 8.0, 4.0]
