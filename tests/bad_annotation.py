"""What users do wrong with `annformer annotate`: further rows of the table in `bad_inputs.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from anndata import AnnData

from bad_inputs import Kit, Row

FITTED = "annotate fit cells.h5ad --model model --out out --tuning none"
CALLED = "annotate predict cells.h5ad --model classifier --out out.h5ad"


def _with_labels(labels: Callable[[AnnData], object]) -> Callable[[Kit], None]:
    return lambda kit: kit.cells(lambda adata: adata.obs.__setitem__("kind", labels(adata)))


def _classifier(kit: Kit) -> None:
    """A classifier of `cells.h5ad` as `classifier/`."""
    from annformer.tasks._annotation_recipe import AnnotationRecipe
    from annformer.tasks.annotation import CellTypeClassifier

    kit.cells()
    recipe = AnnotationRecipe.read({"tuning": "none", "depths": [1.0], "strengths": [1.0]}, where="row")
    CellTypeClassifier(kit.folder / "model", label_key="cell_type", recipe=recipe).fit(kit.folder / "cells.h5ad").save(
        kit.folder / "classifier"
    )


def _then(change: Callable[[Kit], object]) -> Callable[[Kit], None]:
    def make(kit: Kit) -> None:
        _classifier(kit)
        change(kit)

    return make


def _few_genes(adata: AnnData) -> AnnData:
    total = np.asarray(adata.X.sum(axis=0)).reshape(-1)
    return adata[:, total < np.quantile(total, 0.3)].copy()


def _cut(kit: Kit) -> None:
    path = kit.folder / "classifier" / "classifier.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


ANNOTATIONS = [
    Row("no label_key to learn", FITTED, ("--label_key",)),
    Row("a label_key to learn that obs lacks", f"{FITTED} --label_key celltype", ("'celltype'", "give label_key='cell_type'")),
    Row(
        "a cell without a label",
        f"{FITTED} --label_key kind",
        ("no value in 1", "'unknown'"),
        _with_labels(lambda adata: [None, *["T", "B"] * 100][: adata.n_obs]),
    ),
    Row("one type to learn", f"{FITTED} --label_key kind", ("one type, 'T'", "at least two"), _with_labels(lambda _: "T")),
    Row(
        "no type at all",
        f"{FITTED} --label_key kind",
        ("no type at all", "label_key"),
        _with_labels(lambda _: "unknown"),
    ),
    Row(
        "a type of its own for every cell",
        f"{FITTED} --label_key kind",
        ("60 values for 60 cells",),
        _with_labels(lambda adata: np.arange(adata.n_obs).astype(str)),
    ),
    Row(
        "types of one cell each",
        f"{FITTED} --label_key kind",
        ("each of the 12 types", "give more cells"),
        lambda kit: kit.cells(lambda adata: adata.obs.__setitem__("kind", np.arange(12).astype(str)), n_obs=12),
    ),
    Row("an unknown way of tuning", f"{FITTED} --label_key cell_type --tuning lora", ("lora", "low-rank")),
    Row("an unknown recipe to learn by", f"{FITTED} --label_key cell_type --recipe anotate", ("'anotate'", "annotate-original")),
    Row("no classifier at all", CALLED, ("'classifier'", "no model")),
    Row(
        "a model of another task",
        "annotate predict cells.h5ad --model model --out out.h5ad",
        ("was made for", "annformer annotate fit"),
    ),
    Row(
        "cells without the genes of the reference",
        CALLED,
        ("of the", "genes that the reference expresses", "at least"),
        _then(lambda kit: kit.cells(_few_genes)),
    ),
    Row("a coverage that is no share", f"{CALLED} --coverage 90", ("coverage=90", "--coverage"), _classifier),
    Row("a cluster_key that obs lacks", f"{CALLED} --cluster_key leiden", ("'leiden'",), _classifier),
    Row("a damaged classifier", CALLED, ("classifier.safetensors", "cannot be read"), _then(_cut)),
]

LONELY = _with_labels(lambda adata: ["lonely", *["T", "B"] * 100][: adata.n_obs])
FINE_ANNOTATIONS = [
    Row("a type with one cell", f"{FITTED} --label_key kind", ("has one cell ('lonely')", "59 cells were held back"), LONELY),
    Row("a type with one cell, in batches", f"{FITTED} --label_key kind --batch_key batch", ("has one cell ('lonely')",), LONELY),
]
"""Odd, but answered with exit status 0."""
