"""What a fine-tuned network is taught, taken as a method: whether the network adds anything to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from jaxtyping import Float

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
    from annformer.tasks._cells import chosen_genes, expression_over
    from annformer.tasks._finetune import loaded

    known = MemoryCells(AnnDataSource(cells, layer="X"), loaded(model).vocab.all_trained(), [batch_key])
    batches = known.codes(batch_key)
    panel, _ = chosen_genes(known, batches, recipe.n_genes)
    return find_anchors(expression_over(known, panel), batches, **recipe.anchor.model_dump(), seed=seed)
