"""Dropout whose random numbers are cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout`, but on a CPU four elements share the 64 bits of one random number, and p is rounded to a multiple of 1 / 65,536.

    PyTorch draws a number per element there, which took 10 % of a training step. What is kept is scaled by what is really kept on average.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the class above
        """Drop elements in training."""
        if not (self.training and self.p > 0 and input.is_cpu):
            return super().forward(input)
        return input * _noise(input, round(self.p * LEVELS))


def _noise(like: Tensor, dropped_levels: int) -> Tensor:
    """Zeros, and elsewhere what makes up for them."""
    n = like.numel()
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[:n].view(like.shape) >= dropped_levels - LEVELS // 2
    return kept.to(like.dtype).mul_(LEVELS / (LEVELS - dropped_levels))
