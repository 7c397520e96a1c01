"""What users do wrong with `annformer map`: further rows of the table in `bad_inputs.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from anndata import AnnData
from safetensors.numpy import load_file, save_file

from bad_inputs import Kit, Row, no_batch, one_value

FITTED = "map fit cells.h5ad --model model --out out --n_neighbours 5"
MAPPED = "map predict cells.h5ad --index index --out out.h5ad"


def _fitted(kit: Kit) -> None:
    """An index of `cells.h5ad` as `index/`."""
    from annformer.tasks.mapping import ReferenceMapper

    kit.cells()
    ReferenceMapper(kit.folder / "model", label_key="cell_type", n_neighbours=5).fit(kit.folder / "cells.h5ad").save(kit.folder / "index")


def _then(change: Callable[[Kit], object]) -> Callable[[Kit], None]:
    def make(kit: Kit) -> None:
        _fitted(kit)
        change(kit)

    return make


def _without_most_genes(adata: AnnData) -> AnnData:
    total = np.asarray(adata.X.sum(axis=0)).reshape(-1)
    return adata[:, total < np.quantile(total, 0.6)].copy()


def _embedded_by_another(kit: Kit) -> None:
    from annformer.scgpt import ScGPT
    from annformer.tasks.embedding import embed

    kit.tensors(lambda tensors: tensors.update({"encoder.layers.0.ff_in.bias": tensors["encoder.layers.0.ff_in.bias"] + 0.1}))
    kit.cells(lambda adata: embed(adata, ScGPT.from_pretrained(kit.folder / "model"), copy=True))


def _thesis(kit: Kit) -> None:
    kit.cells()
    (kit.folder / "out").mkdir()
    (kit.folder / "out" / "thesis.txt").write_text("mine")


def _cut(name: str) -> Callable[[Kit], object]:
    def cut(kit: Kit) -> None:
        path = kit.folder / "index" / name
        path.write_bytes(path.read_bytes()[:-100])

    return cut


def _exchange_model(kit: Kit) -> None:
    tensors = load_file(kit.folder / "index" / "model" / "model.safetensors")
    tensors["encoder.layers.0.ff_in.bias"] += 0.1
    save_file(tensors, kit.folder / "index" / "model" / "model.safetensors")


MAPPINGS = [
    Row("no subcommand of that name", "map fitt cells.h5ad --label_key cell_type --out out", ("'fitt'", "did you mean fit")),
    Row("no label_key to map by", FITTED, ("--label_key",)),
    Row("a label_key to map by that obs lacks", f"{FITTED} --label_key celltype", ("'celltype'", "cell_type")),
    Row("no label to map by", f"{FITTED} --label_key kind", ("'kind'", "no label", "'unknown'"), one_value("kind", "unknown")),
    Row(
        "a label of its own for every cell",
        f"{FITTED} --label_key name",
        ("60 labels for 60 cells",),
        lambda kit: kit.cells(lambda adata: adata.obs.__setitem__("name", np.arange(adata.n_obs).astype(str))),
    ),
    Row("more neighbours than cells", f"{FITTED} --label_key cell_type --n_neighbours 60", ("60 labelled cells", "n_neighbours")),
    Row("no such search", f"{FITTED} --label_key cell_type --search annoy", ("annoy", "exact")),
    Row("an embedding that is not there", f"{FITTED} --label_key cell_type --embedding X_mine", ("X_mine", "--embedding")),
    Row("an index is not overwritten unasked", f"{FITTED} --label_key cell_type", ("out exists", "earlier index"), _thesis),
    Row("no index at all", MAPPED, ("there is no such folder",)),
    Row("a model is no index", "map predict cells.h5ad --index model --out out.h5ad", ("no index", "config.json", "annformer map fit")),
    Row(
        "a query without the genes of the reference",
        MAPPED,
        ("genes of the reference", "50%"),
        _then(lambda kit: kit.cells(_without_most_genes)),
    ),
    Row(
        "a query embedded by another model",
        f"{MAPPED} --embedding X_annformer",
        ("X_annformer", "was made by", "--embedding"),
        _then(_embedded_by_another),
    ),
    Row("an index with another model", MAPPED, ("not the one by which the reference was embedded",), _then(_exchange_model)),
    Row("a damaged index", MAPPED, ("damaged", "vectors.npy"), _then(_cut("vectors.npy"))),
    Row("an index of damaged labels", MAPPED, ("damaged", "cells.arrow"), _then(_cut("cells.arrow"))),
    Row("a study that is in the index", "map add cells.h5ad --index index", ("all 60 labelled cells", "twice", "fit it again"), _fitted),
    Row("a novelty that is no share", f"{MAPPED} --unassigned_above 99", ("unassigned_above=99", "0.99"), _fitted),
    Row(
        "the table would replace a file",
        MAPPED,
        ("out.csv", "--overwrite"),
        _then(lambda kit: (kit.folder / "out.csv").write_text("mine")),
    ),
]

FINE_MAPPINGS = [
    Row("one label to map by is enough", f"{FITTED} --label_key kind", ("one label only, 'T'",), one_value("kind", "T")),
    Row(
        "cells without a label are left out of a reference",
        f"{FITTED} --label_key batch",
        ("1 of 60 cells have no label",),
        lambda kit: kit.cells(no_batch),
    ),
]
"""Odd, but answered with exit status 0."""
