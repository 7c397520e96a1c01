"""Calling types against embedding alone: seconds for the same cells.

    python benchmarks/annotation_speed.py CELLS.h5ad [--label_key cell_type] [--cells 1000]

A classifier is fitted on half of the cells and calls some of the others; the network reads them either way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
import torch

from _timing import alternate, machine, print_table, ratio
from annformer import embed
from annformer.evaluate.integration import UNLABELLED
from annformer.scgpt import ScGPT
from annformer.tasks.annotation import CellTypeClassifier

BAR = 1.05


def main() -> None:
    """Fit, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells_file", type=Path)
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--cells", type=int, default=1_000, help="cells that are called")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = anndata.read_h5ad(given.cells_file)
    cells = cells[~cells.obs[given.label_key].astype(str).isin(UNLABELLED)].copy()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    reference, query = cells[order[::2]].copy(), cells[order[1::2][: given.cells]].copy()
    model = ScGPT.from_pretrained("annformer-base")
    classifier = CellTypeClassifier(model, label_key=given.label_key, threads=1).fit(reference, progress=False)
    ways = {
        "embed": lambda _: embed(query, model, progress=False),
        "predict": lambda _: classifier.predict(query, progress=False),
    }
    timings = alternate(ways, given.rounds)
    times = ratio(timings["predict"], timings["embed"])
    rows = [[name, timing.seconds, query.n_obs / timing.seconds] for name, timing in timings.items()]
    print_table(f"{query.n_obs:,} cells, one thread", ["way", "s", "cells/s"], rows)
    print(f"\npredict / embed: {times:.3f} (bar {BAR})\n{machine()}")


if __name__ == "__main__":
    main()
