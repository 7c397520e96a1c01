"""CellBatch -> TokenBatch: pick genes, bin their values by the cell's own quantiles, put `<cls>` first, pack.

A value bin is 0 for zero and 1 .. n_bins - 1 for the non-zero values of a cell, which are cut at n_bins - 1 quantiles of these same values
(float64, linear interpolation, exactly as `np.quantile` computes them). A value that equals m > 1 edges may stand in any of the m bins that
end there; which one is drawn, uniformly. Ties are common in counts, so this draw, the choice of genes in long cells and the choice of
zeros are the only randomness here, and all are hashes of (cell, gene): the cell's key is the order-free sum of the hashes of its (gene,
value) pairs. So the tokens of a cell depend on its content, the seed and the step (and where zeros are wanted on which genes were
measured), never on its neighbours, on row or column order, chunks, workers or dtype.
"""

from __future__ import annotations

from annformer.tokenizer.packing import panel_expression, profile_of, tokenize
from annformer.tokenizer.settings import TokenizerSettings, n_kept

__all__ = ["TokenizerSettings", "n_kept", "panel_expression", "profile_of", "tokenize"]
