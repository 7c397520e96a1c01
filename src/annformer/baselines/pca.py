"""Principal components: the floor under every cell embedding."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float


def pca_embedding(
    expression: sp.csr_array | sp.csr_matrix | np.ndarray, *, n_components: int = 50, seed: int = 0
) -> Float[np.ndarray, "cell component"]:
    """Project cells on the first principal components of their centred expression.

    No gene is scaled or left out: on log-normalised counts that is a stronger floor than scaled highly variable genes.

    Parameters
    ----------
    expression
        Cells in rows, log-normalised.
    n_components
        At most; fewer when there are fewer cells or genes.
    seed
        Starting vector of the solver.
    """
    from sklearn.decomposition import PCA

    n_components = min(n_components, min(expression.shape) - 1)
    components = PCA(n_components, svd_solver="arpack", random_state=seed).fit_transform(expression)
    return np.asarray(components, dtype=np.float32)
