"""Scores of any method: arrays in, a table out; knows nothing of the rest of annformer."""

from annformer.evaluate.annotation import leave_out_annotation, summarise
from annformer.evaluate.clustering import clustering_scores

__all__ = ["clustering_scores", "leave_out_annotation", "summarise"]
