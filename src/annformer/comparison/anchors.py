"""What a fine-tuned network is taught, taken as a method: whether the network adds anything to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from jaxtyping import Float, Int

from annformer.data.anndata import AnnDataSource
from annformer.data.random_cells import MemoryCells
from annformer.scgpt import ScGPT

if TYPE_CHECKING:
    from annformer.tasks._integration_recipe import IntegrationRecipe


def anchors_of(
    cells: AnnData, model: ScGPT | str | Path, recipe: IntegrationRecipe, *, batch_key: str, seed: int
) -> Float[np.ndarray, "cell component"]:
    """Find the places that `BatchIntegrator` with this recipe and seed would draw the embeddings of these cells to.

    Parameters
    ----------
    cells
        Counts in X, batches in obs.
    model
        Its vocabulary says which genes are known.
    """
    from annformer.tasks._alignment import find_anchors
    from annformer.tasks._cells import expression_over

    known, batches, panel = _panel(cells, model, recipe, batch_key)
    return find_anchors(expression_over(known, panel), batches, **recipe.anchor.model_dump(), seed=seed)


def require_variable_genes(cells: AnnData, model: ScGPT | str | Path, recipe: IntegrationRecipe, *, batch_key: str) -> None:
    """Say before the first method what fine-tuning would say after the last: hardly a gene varies.

    Raises
    ------
    InputError
        When that is so, or the model is fine-tuned already.
    """
    _panel(cells, model, recipe, batch_key)


def _panel(
    cells: AnnData, model: ScGPT | str | Path, recipe: IntegrationRecipe, batch_key: str
) -> tuple[MemoryCells, Int[np.ndarray, "cell"], Int[np.ndarray, "panel"]]:
    """Cells, their batches, and the genes that fine-tuning would choose."""
    from annformer.tasks._cells import chosen_genes
    from annformer.tasks._finetune import loaded

    known = MemoryCells(AnnDataSource(cells, layer="X"), loaded(model).vocab.all_trained(), [batch_key])
    batches = known.codes(batch_key)
    return known, batches, chosen_genes(known, batches, recipe.n_genes)[0]
