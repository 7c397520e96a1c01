"""Whether cells can be integrated."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float, Int

from annformer.errors import AnnformerWarning, input_error

FEWEST_CELLS = 10
"""Cells of the smallest batch: fewer tell nothing about what the batch does to expression."""


def require_batches(codes: Int[np.ndarray, "cell"], names: tuple[str, ...], batch_key: str) -> None:
    sizes = np.bincount(codes, minlength=len(names))
    if len(names) < 2:
        found = f"obs[{batch_key!r}] has one batch only, {names[0]!r}"
        raise input_error(found, "at least two batches", "choose another batch_key; cells of one batch are embedded by `annformer embed`")
    if (small := np.flatnonzero(sizes < FEWEST_CELLS)).size:
        listed = ", ".join(f"{names[i]!r} {sizes[i]}" for i in small[:5])
        found = f"{len(small)} of {len(names)} batches of obs[{batch_key!r}] have very few cells: {listed}"
        remedy = "leave these cells out, or join batches that belong together"
        raise input_error(found, f"at least {FEWEST_CELLS} cells in every batch", remedy)


def warn_empty(embedding: Float[np.ndarray, "cell component"]) -> None:
    if n := int(np.isnan(embedding[:, 0]).sum()):
        warnings.warn(f"{n} cells express none of the chosen genes: their embedding is NaN", AnnformerWarning, stacklevel=3)
