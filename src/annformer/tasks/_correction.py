"""Expression decoded from cell embeddings, in log-normalised units."""

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


@dataclass(frozen=True)
class Correction:
    """For each gene of the panel the line from what GEPC decodes to log-normalised expression."""

    slope: Float[ndarray, "panel"]
    intercept: Float[ndarray, "panel"]

    def tensors(self) -> dict[str, Tensor]:
        """To be saved."""
        return {"slope": torch.from_numpy(self.slope), "intercept": torch.from_numpy(self.intercept)}

    def decode(self, model: ScGPT, states: Float[ndarray, "cell width"], weights: Float[ndarray, "batch"]) -> Float[ndarray, "cell panel"]:
        """Expression of cells, all with the same mixture of batch contexts; never below 0."""
        every = np.broadcast_to(weights, (len(states), len(weights)))
        parts = [values for _, values in _decoded(model, states, every)]
        return np.maximum(np.concatenate(parts) * self.slope + self.intercept, 0).astype(np.float32)


def fit_correction(model: ScGPT, states: Float[ndarray, "cell width"], codes: Int[ndarray, "cell"], expression: sp.csr_array) -> Correction:
    """Fit the lines by least squares on cells that are decoded with the context of their own batch."""
    n = states.shape[0]
    sums = np.zeros((4, expression.shape[1]))
    for rows, values in _decoded(model, states, np.eye(int(codes.max()) + 1, dtype=np.float32)[codes]):
        known = np.isfinite(values[:, 0])
        x, y = np.where(known[:, None], values, 0).astype(np.float64), expression[rows].toarray() * known[:, None]
        sums += np.stack((x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)))
    x, y, xx, xy = sums / n
    slope = np.maximum((xy - x * y) / np.maximum(xx - x * x, 1e-6), 0)  # a gene decoded upside down is better left at its mean
    return Correction(slope.astype(np.float32), (y - slope * x).astype(np.float32))


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
            values = gepc.of_genes(torch.from_numpy(states[rows]).to(contexts), context, genes)
            yield rows, values.float().cpu().numpy()
