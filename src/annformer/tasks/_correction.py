"""Expression decoded from integrated embeddings, in log-normalised units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from annformer.objectives.gepc import GEPC
from annformer.scgpt import ScGPT

CELLS_AT_ONCE = 512
RIDGE = 1e-3
"""Of the map, in units of the cells; embeddings have variance 1."""


@dataclass(frozen=True)
class Correction:
    """From integrated embeddings to log-normalised expression.

    A cell state knows its batch: GEPC has a use for it. So what is decoded is the part of the state that the integrated embedding, which
    does not know the batch, tells: a linear image of it.
    """

    to_state: Float[ndarray, "component+1 width"]
    """Linear map from the integrated embedding, and a constant, to cell states."""
    slope: Float[ndarray, "panel"]
    """For each gene the line from what GEPC decodes to log-normalised expression."""
    intercept: Float[ndarray, "panel"]

    def tensors(self) -> dict[str, Tensor]:
        """To be saved."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ("to_state", "slope", "intercept")}

    def decode(
        self, model: ScGPT, embedding: Float[ndarray, "cell component"], weights: Float[ndarray, "batch"]
    ) -> Float[ndarray, "cell panel"]:
        """Expression of cells, all with the same mixture of batch contexts; never below 0."""
        every = np.broadcast_to(weights, (len(embedding), len(weights)))
        parts = [values for _, values in _decoded(model, _with_one(embedding) @ self.to_state, every)]
        return np.maximum(np.concatenate(parts) * self.slope + self.intercept, 0).astype(np.float32)


def fit_correction(
    model: ScGPT,
    states: Float[ndarray, "cell width"],
    embedding: Float[ndarray, "cell component"],
    codes: Int[ndarray, "cell"],
    expression: sp.csr_array,
) -> Correction:
    """Fit map and lines by least squares; a cell is decoded with the context of its own batch. Cells that are NaN take no part."""
    known = np.flatnonzero(np.isfinite(states[:, 0]))
    inputs = _with_one(embedding[known])
    ridge = RIDGE * len(known) * np.eye(inputs.shape[1]) * np.append(np.ones(inputs.shape[1] - 1), 0)
    to_state = np.linalg.solve(inputs.T @ inputs + ridge + 1e-9 * np.eye(len(ridge)), inputs.T @ states[known]).astype(np.float32)
    own = np.eye(int(codes.max()) + 1, dtype=np.float32)[codes[known]]
    sums = np.zeros((4, expression.shape[1]))
    for rows, values in _decoded(model, (inputs @ to_state).astype(np.float32), own):
        x, y = values.astype(np.float64), expression[known[rows]].toarray()
        sums += np.stack((x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)))
    x, y, xx, xy = sums / len(known)
    slope = np.maximum((xy - x * y) / np.maximum(xx - x * x, 1e-6), 0)  # a gene decoded upside down is better left at its mean
    return Correction(to_state, slope.astype(np.float32), (y - slope * x).astype(np.float32))


def _with_one(embedding: Float[ndarray, "cell component"]) -> Float[ndarray, "cell component+1"]:
    return np.concatenate((embedding, np.ones((len(embedding), 1), embedding.dtype)), 1)


def _decoded(
    model: ScGPT, states: Float[ndarray, "cell width"], weights: Float[ndarray, "cell batch"]
) -> Iterator[tuple[slice, Float[ndarray, "cell panel"]]]:
    """What GEPC says of every gene of the panel, block by block."""
    gepc, encoder = model.objectives["gepc"], model.encoder
    assert isinstance(gepc, GEPC) and encoder.batch is not None and encoder.batch_norm is not None and model.panel is not None
    device = encoder.gene.weight.device
    with torch.inference_mode():
        contexts = encoder.batch_norm(encoder.batch.weight)
        genes = encoder.gene_embedding(torch.from_numpy(model.panel).to(device))
        for first in range(0, len(states), CELLS_AT_ONCE):
            rows = slice(first, first + CELLS_AT_ONCE)
            context: Tensor = torch.from_numpy(np.ascontiguousarray(weights[rows])).to(contexts) @ contexts
            values = gepc.of_genes(torch.from_numpy(np.ascontiguousarray(states[rows], np.float32)).to(contexts), context, genes)
            yield rows, values.float().cpu().numpy()
