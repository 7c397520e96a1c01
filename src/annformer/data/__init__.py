"""Where cells come from."""

from annformer.data.anndata import AnnDataSource
from annformer.data.counts import CountsChoice
from annformer.data.source import CellSource

__all__ = ["AnnDataSource", "CellSource", "CountsChoice"]
