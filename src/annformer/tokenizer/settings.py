"""Settings of the tokenizer, and what they say about the length of a cell."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from pydantic import Field

from annformer.config import Config


class TokenizerSettings(Config):
    """How cells become tokens; part of a model, because a network reads only values made the way it was trained on."""

    n_bins: int = Field(51, ge=2)
    """Value bins with the one for zero."""
    max_length: int = Field(1200, ge=2)
    """Most tokens of a cell, `<cls>` included; of longer cells a random choice of genes is kept."""
    zeros: Annotated[float, Field(ge=0)] | Literal["all"] = 0.0
    """Genes that were measured and are not expressed, as tokens of value 0: so many for each expressed gene that is kept, drawn at random,
    or "all". Where `max_length` cuts, expressed genes and zeros are thinned in the same proportion."""
    cls_value: float = -2.0
    """Value at `<cls>`: -2 in pretraining and zero-shot use, 0 in the fine-tuning of the published models."""
    values: Literal["bins", "raw"] = "bins"
    """What the network gets: the value bin, or the value as it is."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of ties and of the choice of genes."""


def n_kept(
    n_expressed: Int[ndarray, "cell"], n_measured: int | Int[ndarray, "cell"], settings: TokenizerSettings
) -> tuple[Int[ndarray, "cell"], Int[ndarray, "cell"]]:
    """Count the expressed genes and the zeros of each cell that become tokens: with `<cls>`, its length.

    A cell that expresses nothing has no zeros either: it stays a lone `<cls>`, by which it is known as empty. The room of a cell that is
    too long is shared as the original's draw among all candidates shares it on average, but one expressed gene is always kept.

    Parameters
    ----------
    n_expressed
        Expressed genes of each cell.
    n_measured
        Genes of the vocabulary that were measured: `CellBatch.n_measured`. Not read without zeros.
    """
    room = settings.max_length - 1
    if settings.zeros == 0:
        return np.minimum(n_expressed, room), np.zeros_like(n_expressed)
    there = np.where(n_expressed > 0, n_measured - n_expressed, 0)
    n_zeros = there if settings.zeros == "all" else np.minimum(there, np.rint(settings.zeros * n_expressed)).astype(np.int64)
    total = np.maximum(n_expressed + n_zeros, 1)
    thinned = np.maximum((2 * room * n_expressed + total) // (2 * total), np.minimum(n_expressed, 1))  # the nearest whole number
    too_long = total > room
    return np.where(too_long, thinned, n_expressed), np.where(too_long, room - thinned, n_zeros)
