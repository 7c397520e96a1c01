"""Types by the nearest cells of another study, nothing trained: ReferenceMapper, and neighbours in principal components of the reference.

    python benchmarks/mapping_types.py --data FOLDER [--model annformer-base]

FOLDER holds pbmc4k_scvi_labels.h5ad (the reference) and pbmc3k.h5ad (the query), which nobody has pretrained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

import annformer as af
from _timing import machine, print_table
from annformer.baselines import log_normalised
from annformer.evaluate import classification_scores

REFERENCE, QUERY = "pbmc4k_scvi_labels", "pbmc3k"
SAME = {
    "B cells": "B",
    "CD14+ Monocytes": "CD14+ Mono",
    "CD4 T cells": "CD4 T",
    "CD8 T cells": "CD8 T",
    "Dendritic Cells": "DC",
    "FCGR3A+ Monocytes": "FCGR3A+ Mono",
    "Megakaryocytes": "Platelet",
    "NK cells": "NK",
    "Naive CD4 T": "CD4 T",
    "Memory CD4 T": "CD4 T",
}
BROAD = {"CD4 T": "T", "CD8 T": "T", "CD14+ Mono": "Mono", "FCGR3A+ Mono": "Mono"}
N_NEIGHBOURS, N_COMPONENTS = 15, 50


def cells(data: Path, name: str) -> tuple[ad.AnnData, np.ndarray]:
    """Labelled cells of a study, and their types by the names of the query."""
    adata = ad.read_h5ad(data / f"{name}.h5ad")
    adata = adata[adata.obs["cell_type"].astype(str) != "unlabelled"].copy()
    return adata, adata.obs["cell_type"].astype(str).replace(SAME).to_numpy(dtype=object)


def by_components(reference: ad.AnnData, types: np.ndarray, query: ad.AnnData, metric: str) -> np.ndarray:
    """Vote of the nearest cells in principal components of the reference, over the genes that both have."""
    genes = [name for name in reference.var_names if name in query.var_names]
    known, asked = (log_normalised(each[:, genes].X) for each in (reference, query))
    pca = PCA(N_COMPONENTS, svd_solver="arpack", random_state=0).fit(known)
    votes = KNeighborsClassifier(N_NEIGHBOURS, metric=metric).fit(pca.transform(known), types)
    return votes.predict(pca.transform(asked))


def called(reference: ad.AnnData, types: np.ndarray, query: ad.AnnData, model: af.ScGPT) -> Iterator[tuple[str, np.ndarray]]:
    """Types of the query by every method."""
    labelled = reference.copy()
    labelled.obs["cell_type"] = types.astype(str)
    mapper = af.ReferenceMapper(model, label_key="cell_type", n_neighbours=N_NEIGHBOURS).fit(labelled, progress=False)
    said = mapper.predict(query, unassigned_above=None, copy=True, progress=False).obs
    yield "ReferenceMapper, zero-shot", said["mapped_cell_type"].astype(str).to_numpy(dtype=object)
    for metric in ("cosine", "euclidean"):
        name = f"{N_NEIGHBOURS} neighbours in {N_COMPONENTS} principal components of the reference ({metric})"
        yield name, by_components(reference, types, query, metric)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="annformer-base")
    given = parser.parse_args()
    model = af.ScGPT.from_pretrained(given.model)
    (reference, types), (query, truth) = cells(given.data, REFERENCE), cells(given.data, QUERY)
    broad = np.array([BROAD.get(name, name) for name in truth], dtype=object)
    del query.obs["cell_type"]
    rows = []
    for name, said in called(reference, types, query, model):
        fine = classification_scores(truth, said)
        coarse = classification_scores(broad, np.array([BROAD.get(one, one) for one in said], dtype=object))
        rows.append([name, *(scores[which] for scores in (fine, coarse) for which in ("accuracy", "macro_f1"))])
    title = f"{query.n_obs:,} cells of {QUERY} by {reference.n_obs:,} of {REFERENCE}"
    print_table(
        title, ["method", f"{len(set(truth))} types: accuracy", "macro-F1", f"{len(set(broad))} broad: accuracy", "macro-F1 "], rows
    )
    print(f"\nModel {model.name}, fingerprint {model.fingerprint[:12]}. {machine()}")


if __name__ == "__main__":
    main()
