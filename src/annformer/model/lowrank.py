"""Low-rank fine-tuning: a few numbers beside each weight of the transformer layers learn, the weights stay (Hu et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from annformer.model.encoder import CellEncoder

TUNED = ("qkv", "attention_out", "ff_in", "ff_out")


class LowRank(nn.Module):
    """weight -> weight + up @ down; begins as the weight itself."""

    def __init__(self, weight: Float[Tensor, "out in"], rank: int) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        rank = min(rank, n_out, n_in)
        self.up = nn.Parameter(torch.zeros(n_out, rank))
        self.down = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Weight as the layer uses it."""
        return weight + self.up @ self.down


def add_low_rank(encoder: CellEncoder, rank: int) -> None:
    """Freeze the encoder but its expression view, and put a `LowRank` beside every weight of its layers."""
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith("view."))
    for layer in encoder.layers:
        for name in TUNED:
            linear = getattr(layer, name)
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))


def merge_low_rank(encoder: CellEncoder) -> None:
    """Turn weights and what stands beside them into plain weights that can learn."""
    for layer in encoder.layers:
        for name in TUNED:
            parametrize.remove_parametrizations(getattr(layer, name), "weight")
    encoder.requires_grad_(True)  # noqa: FBT003
