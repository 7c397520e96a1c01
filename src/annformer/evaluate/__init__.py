"""Scores of any method: arrays in, a table out; knows nothing of the rest of annformer."""

from annformer.evaluate.annotation import leave_out_annotation, summarise
from annformer.evaluate.clustering import clustering_scores
from annformer.evaluate.integration import DEFINITIONS, IntegrationParts, integration_parts, integration_scores, per_label_scores, versions
from annformer.evaluate.neighbours import expression_strata, neighbour_scores, partner_ranks
from annformer.evaluate.verdict import Verdict, draws, verdict

__all__ = [
    "DEFINITIONS",
    "IntegrationParts",
    "Verdict",
    "clustering_scores",
    "draws",
    "expression_strata",
    "integration_parts",
    "integration_scores",
    "leave_out_annotation",
    "neighbour_scores",
    "partner_ranks",
    "per_label_scores",
    "summarise",
    "verdict",
    "versions",
]
