"""What a fine-tuned network is taught, taken as a method: whether the network adds anything to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from jaxtyping import Float

from annformer.data.anndata import AnnDataSource
from annformer.data.random_cells import MemoryCells
from annformer.scgpt import ScGPT
from annformer.tokenizer import panel_expression

if TYPE_CHECKING:
    from annformer.tasks._integration_recipe import IntegrationRecipe

CELLS_AT_ONCE = 1024


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
    from annformer.baselines.expression import highly_variable
    from annformer.tasks._alignment import find_anchors
    from annformer.tasks._finetune import loaded

    known = MemoryCells(AnnDataSource(cells, layer="X"), loaded(model).vocab.all_trained(), [batch_key])
    batches, all_cells = known.codes(batch_key), known.rows(np.arange(known.n_obs))
    varying = highly_variable(sp.csr_matrix(all_cells.counts), batches.astype(str), recipe.n_genes)
    panel = np.sort(all_cells.gene_ids[varying.genes])
    blocks = np.array_split(np.arange(known.n_obs), -(-known.n_obs // CELLS_AT_ONCE))  # dense inside: a few cells at a time
    parts = [sp.csr_array(np.nan_to_num(panel_expression(known.rows(rows), panel))) for rows in blocks]
    expression = sp.csr_array(sp.vstack(parts, format="csr"))
    return find_anchors(expression, batches, **recipe.anchor.model_dump(), seed=seed)
