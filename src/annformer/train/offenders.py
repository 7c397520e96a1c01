"""Which cells of a batch make the loss infinite."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from annformer.inference import evaluating
from annformer.scgpt import ScGPT
from annformer.tokens import TokenBatch, places_of


@torch.no_grad()
def cells_without_finite_loss(model: ScGPT, tokens: TokenBatch, n_looks: int) -> list[int]:
    """Numbers of the cells whose losses, each cell taken alone, are not all finite.

    Parameters
    ----------
    n_looks
        How often the model encodes, which is at least once per cell: more where other ranks have more cells, and all have to take part.
    """
    with evaluating(model):
        looks = [model.losses(take_cells(tokens, torch.arange(cell, min(cell + 1, tokens.n_cells)))) for cell in range(n_looks)]
    return [cell for cell, losses in enumerate(looks) if not all(bool(torch.isfinite(loss.total)) for loss in losses.values())]


def take_cells(tokens: TokenBatch, cells: Int[Tensor, "some"]) -> TokenBatch:
    """Cut some cells out of a packed batch."""
    cells = cells.to(tokens.offsets.device)
    offsets, places = places_of(tokens.offsets, cells)
    per_token = {
        name: value[places]
        for name in ("gene_ids", "values", "flags", "dose", "targets", "modality")
        if (value := getattr(tokens, name)) is not None
    }
    return tokens._replace(
        **per_token,
        offsets=offsets,
        n_visible=tokens.n_visible[cells],
        labels={name: label[cells] for name, label in tokens.labels.items()},
        cell=None if tokens.cell is None else tokens.cell[cells],
        expression=None if tokens.expression is None else tokens.expression[cells],
        profile=None if tokens.profile is None else tokens.profile.take(cells),
    )
