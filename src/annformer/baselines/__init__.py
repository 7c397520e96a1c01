"""The simple method beside every task; knows nothing of the rest of annformer."""

from annformer.baselines.gene_mean import gene_means
from annformer.baselines.pca import pca_embedding
from annformer.baselines.ridge import VisibleGeneRidge

__all__ = ["VisibleGeneRidge", "gene_means", "pca_embedding"]
