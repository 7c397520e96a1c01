"""The simple method beside every task; knows nothing of the rest of annformer."""

from annformer.baselines._packages import available
from annformer.baselines.annotation import ANNOTATION, Called
from annformer.baselines.expression import VariableGenes, highly_variable, log_normalised, scaled
from annformer.baselines.gene_mean import gene_means
from annformer.baselines.integration import INTEGRATION
from annformer.baselines.pca import pca_embedding
from annformer.baselines.ridge import VisibleGeneRidge

__all__ = [
    "ANNOTATION",
    "INTEGRATION",
    "Called",
    "VariableGenes",
    "VisibleGeneRidge",
    "available",
    "gene_means",
    "highly_variable",
    "log_normalised",
    "pca_embedding",
    "scaled",
]
