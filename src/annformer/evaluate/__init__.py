"""Scores of any method: arrays in, a table out; knows nothing of the rest of annformer."""

from annformer.evaluate.annotation import leave_out_annotation, summarise
from annformer.evaluate.clustering import clustering_scores
from annformer.evaluate.neighbours import expression_strata, neighbour_scores, partner_ranks

__all__ = ["clustering_scores", "expression_strata", "leave_out_annotation", "neighbour_scores", "partner_ranks", "summarise"]
