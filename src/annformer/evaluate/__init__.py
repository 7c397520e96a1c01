"""Scores of any method: arrays in, a table out; knows nothing of the rest of annformer."""

from annformer.evaluate.annotation import leave_out_annotation, summarise
from annformer.evaluate.calibration import (
    Interval,
    calibrated_error,
    calibration_error_on_draws,
    coverage,
    coverage_interval,
    expected_calibration_error,
    interval,
    novelty_auroc,
    novelty_auroc_on_draws,
    reliability,
)
from annformer.evaluate.classification import (
    CLASSIFICATION_DEFINITIONS,
    classification_scores,
    confusion,
    macro_f1_on_draws,
    per_type_scores,
)
from annformer.evaluate.clustering import clustering_scores
from annformer.evaluate.integration import DEFINITIONS, IntegrationParts, integration_parts, integration_scores, per_label_scores
from annformer.evaluate.neighbours import expression_strata, neighbour_scores, partner_ranks
from annformer.evaluate.verdict import Verdict, draws, verdict

__all__ = [
    "CLASSIFICATION_DEFINITIONS",
    "DEFINITIONS",
    "IntegrationParts",
    "Interval",
    "Verdict",
    "calibrated_error",
    "calibration_error_on_draws",
    "classification_scores",
    "clustering_scores",
    "confusion",
    "coverage",
    "coverage_interval",
    "draws",
    "expected_calibration_error",
    "expression_strata",
    "integration_parts",
    "integration_scores",
    "interval",
    "leave_out_annotation",
    "macro_f1_on_draws",
    "neighbour_scores",
    "novelty_auroc",
    "novelty_auroc_on_draws",
    "partner_ranks",
    "per_label_scores",
    "per_type_scores",
    "reliability",
    "summarise",
    "verdict",
]
