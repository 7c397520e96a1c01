"""What pretraining is worth on cells that it never saw: expression of asked genes, cell types without labels and with a few, gene families.

    python benchmarks/pretraining.py --model annformer-base --data FOLDER --store STORE --out DIR

FOLDER holds the held-out sets (`SETS` in pretraining_cells.py), one h5ad each, STORE the cells that the model was pretrained on. Nothing is
chosen on held-out cells but where a table says so.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

import annformer as af
import pretraining_clusters
import pretraining_expression
import pretraining_fewshot
import pretraining_genes
from _timing import machine, print_table
from annformer.errors import AnnformerWarning
from pretraining_cells import find_sets, one_thread, read_corpus

Part = Callable[[], tuple[dict[str, pd.DataFrame], list[str]]]

TITLES = {
    "expression": "Asked genes: squared error in bins",
    "expression_by_share": "Asked genes: mean over the sets at each asked share",
    "clusters": "Cell types without labels: AvgBIO",
    "clusters_by_nmi": "Cell types without labels: AvgBIO at the resolution that the labels choose",
    "clusters_parts": "Cell types without labels: mean over the sets of the parts of AvgBIO",
    "fewshot": "Cell types from a few labelled cells: macro-F1",
    "fewshot_difference": "Cell types from a few labelled cells: the model less the others, macro-F1",
    "genes": "Gene families: median rank of the other members among all genes",
}
"""Tables that are printed; the others are only written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = _options(arguments)
    one_thread()
    model = af.ScGPT.from_pretrained(options.model)
    corpus = read_corpus(options.store, model, seed=options.seed, max_cells=options.corpus_cells)
    parts: dict[str, Part] = {
        "expression": lambda: pretraining_expression.tables(
            model, corpus, find_sets(options.data, options.sets), n_cells=options.cells, ranks=options.ranks, seed=options.seed
        ),
        "clusters": lambda: pretraining_clusters.tables(
            model, corpus, find_sets(options.data, options.sets), n_cells=options.cluster_cells, n_random=options.random, seed=options.seed
        ),
        "genes": lambda: pretraining_genes.tables(model, corpus, n_random=options.random, n_draws=options.draws, seed=options.seed),
        "fewshot": lambda: pretraining_fewshot.tables(
            model,
            find_sets(options.data, options.fewshot_sets),
            sizes=options.sizes,
            n_seeds=options.seeds,
            seed=options.seed,
            runs=None if options.out is None else options.out / "fewshot_runs.csv",
        ),
    }
    print(f"Model: {model.name}, fingerprint {model.fingerprint[:12]}.")
    for name in options.parts:
        began = time.process_time()
        one_thread()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AnnformerWarning)  # a few genes known, counts that are none: the tables say which set it is
            found, notes = parts[name]()
        cost = [] if name == "fewshot" else [f"{time.process_time() - began:,.0f} CPU s."]  # whose runs may be of an earlier start
        _show(found, [*notes, *cost], options.out)
    print(f"\n{machine()}, one thread.")


def _show(found: dict[str, pd.DataFrame], notes: Sequence[str], out: Path | None) -> None:
    for name, table in found.items():
        if name in TITLES:
            print_table(TITLES[name], list(table.columns), table.to_numpy(dtype=object).tolist())
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            table.to_csv(out / f"{name}.csv", index=False)
    print("\n" + "\n".join(notes), flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder or name")
    parser.add_argument("--data", type=Path, required=True, help="folder with an h5ad for each held-out set")
    parser.add_argument("--store", type=Path, required=True, help="store that the model was pretrained on")
    parser.add_argument("--out", type=Path, help="folder for CSV files")
    known = ("expression", "clusters", "genes", "fewshot")
    parser.add_argument("--parts", nargs="+", default=known, choices=known)
    parser.add_argument("--sets", nargs="+", help="held-out sets of expression and clusters; default: all that are known")
    parser.add_argument("--cells", type=int, default=200, help="cells of a set whose expression is predicted")
    parser.add_argument("--cluster_cells", type=int, default=400, help="cells of a set that are clustered")
    parser.add_argument("--random", type=int, default=3, help="random networks")
    parser.add_argument("--ranks", type=int, nargs="+", default=pretraining_expression.RANKS, help="of the ridge, to choose from")
    parser.add_argument("--corpus_cells", type=int, help="cells of the store that the floors learn from; default: all")
    parser.add_argument("--draws", type=int, default=2_000, help="random gene sets")
    parser.add_argument("--fewshot_sets", nargs="+", default=pretraining_fewshot.SETS)
    parser.add_argument("--sizes", type=int, nargs="+", default=(50, 200, 1_000), help="labelled cells")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labelled cells")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
