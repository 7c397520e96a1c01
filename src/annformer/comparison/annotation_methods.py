"""Methods that call types, by name: ours, and every baseline."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Shaped

from annformer.comparison.annotation_scores import COVERAGE
from annformer.comparison.calls import BATCH, TYPE, Called, Caller
from annformer.comparison.embedded import EMBEDDING
from annformer.scgpt import DEFAULT_MODEL, ScGPT
from annformer.tasks._annotation_recipe import AnnotationRecipe

OURS, SCRATCH, MAPPING = "annformer", "annformer from scratch", "annformer mapping"
EXPRESSION, NETWORK = "annformer expression part alone", "annformer network part alone"
PARTS: Final = {"_by_expression": EXPRESSION, "_by_network": NETWORK}
"""Column of the classifier -> the part that it says the calls of."""


def methods(model: ScGPT | str | Path = DEFAULT_MODEL, **classifier: Any) -> dict[str, Caller]:
    """Table of methods by name: ours, and every baseline. `classifier` holds options of `CellTypeClassifier`."""
    from annformer.baselines import ANNOTATION, available

    given = classifier.get("recipe", "annotate")  # read here: what is wrong with it is said before any work
    recipe = given if isinstance(given, AnnotationRecipe) else AnnotationRecipe.named(given)
    ours = partial(_classified, model, {**classifier, "recipe": recipe})
    own = {name: value for name, value in classifier.items() if name in ("device", "threads")}
    table = [
        Caller(OURS, "ours", partial(ours, pretrained=True), random=True, embedded=True),
        Caller(
            SCRATCH,
            "ours",
            partial(ours, pretrained=False),
            random=True,
            only_by_name="only when it is named: it embeds anew in every fold",
        ),
        Caller(MAPPING, "ours", partial(_mapped, model, own), embedded=True),
        *(Caller(name, "floor", partial(_baseline, function), missing=available(name)) for name, function in ANNOTATION.items()),
    ]
    return {caller.name: caller for caller in table}


def _classified(
    model: ScGPT | str | Path, options: Mapping[str, Any], reference: AnnData, query: AnnData, seed: int, *, pretrained: bool
) -> Called:
    from annformer.tasks.annotation import CellTypeClassifier

    batch_key = BATCH if BATCH in reference.obs else None
    classifier = CellTypeClassifier(model, label_key=TYPE, batch_key=batch_key, pretrained=pretrained, layer="X", seed=seed, **options)
    given: dict[str, Any] = {"embedding": EMBEDDING if pretrained else None, "progress": False}
    classifier.fit(reference, **given)
    classifier.predict(query, key_added="called", unassigned_above=None, **given)
    sets = classifier.predict_sets(query, coverage=COVERAGE, allow_empty=True, **given)
    obs = query.obs
    parts = {name: _names(obs["called" + suffix]) for suffix, name in PARTS.items() if "called" + suffix in obs}
    confidence, novelty = (obs["called" + suffix].to_numpy(np.float64) for suffix in ("_confidence", "_novelty"))
    return Called(_names(obs["called"]), confidence, novelty, sets, parts if pretrained else {})


def _mapped(model: ScGPT | str | Path, options: Mapping[str, Any], reference: AnnData, query: AnnData, seed: int) -> Called:  # noqa: ARG001
    from annformer.tasks.mapping import ReferenceMapper

    mapper = ReferenceMapper(model, label_key=TYPE, layer="X", **options).fit(reference, embedding=EMBEDDING, progress=False)
    mapper.predict(query, key_added="called", embedding=EMBEDDING, progress=False)
    share, novelty = (query.obs["called" + suffix].to_numpy(np.float64) for suffix in ("_share", "_novelty"))
    return Called(_names(query.obs["called"]), share, novelty)


def _baseline(function: Any, reference: AnnData, query: AnnData, seed: int) -> Called:
    found = function(reference.X, reference.obs[TYPE].astype(str).to_numpy(), query.X, reference.var_names.to_numpy(), seed=seed)
    return Called(_names(found.types), np.asarray(found.probabilities).max(axis=1))


def _names(values: Any) -> Shaped[np.ndarray, "cell"]:
    text = pd.Series(np.asarray(values, dtype=object))
    return text.where(text.notna(), "unassigned").astype(str).to_numpy(dtype=object)
