"""Batch integration of real sets by annformer and by the simple methods: scores, time, memory, verdicts.

    python benchmarks/integration.py --data FOLDER [--sets pancreas_3studies ...] [--seeds 3] [--methods ...] --out FOLDER

FOLDER holds the sets as .h5ad files with obs "batch" and "cell_type", and pbmc_integration_4batch.tsv.gz, a list of the cells of three of
them. What `annformer compare integrate` would say of each set stands in --out; sets that are there already are not run again.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import pandas as pd

from _timing import machine, print_table
from annformer.cli.compare import write
from annformer.comparison.integrate import compare_integration

SETS = ("sc_mixology_lung_cell_lines", "pancreas_3studies", "pbmc_integration_4batch", "kang_muscat_8donors")
PARTS = {"pbmc3k_10xv1": "pbmc3k", "pbmc4k_10xv2": "pbmc4k_scvi_labels", "kang_ctrl": "kang_ifnb_pbmc", "kang_stim": "kang_ifnb_pbmc"}
"""Batches of pbmc_integration_4batch -> the set that their cells stand in."""
SHOWN = ("overall", "avg_bio", "avg_batch", "seconds", "memory_mb")


def read(data: Path, name: str) -> ad.AnnData:
    """One set; the one of four batches is put together from its parts, over the genes that all of them have."""
    if (data / f"{name}.h5ad").is_file():
        return ad.read_h5ad(data / f"{name}.h5ad")
    listed = pd.read_csv(data / f"{name}.tsv.gz", sep="\t", index_col=0)
    parts = []
    for batch, part in PARTS.items():
        cells = ad.read_h5ad(data / f"{part}.h5ad")
        cells.obs = pd.DataFrame(index=[f"{batch}_{cell}" for cell in cells.obs_names])
        parts.append(cells[listed.index[listed["batch"] == batch]].copy())
    joined = ad.concat(parts, join="inner")[listed.index].copy()
    joined.obs = listed[["batch", "cell_type"]].astype("category")
    return joined


def run(data: Path, name: str, out: Path, *, seeds: int, methods: list[str] | None, model: str, threads: int | None) -> None:
    """Compare on one set, and leave the tables and the page in `out`; goes on where an earlier start stopped."""
    unfinished = out / f".{name}.comparing"
    adata = read(data, name)
    words = f"python benchmarks/integration.py --sets {name} --seeds {seeds}"
    found = compare_integration(
        adata,
        batch_key="batch",
        label_key="cell_type",
        model=model,
        seeds=range(seeds),
        wanted=methods,
        name=name,
        command=words,
        threads=threads,
        folder=unfinished,
    )
    write(found, adata, out / name)
    shutil.rmtree(unfinished, ignore_errors=True)


def means_of(scores: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means over seeds, and the most memory: later seeds use that of the first again."""
    groups = scores.groupby(["method", "kind"], sort=False)
    return groups[[column for column in columns if column in scores]].mean().assign(memory_mb=groups["memory_mb"].max()).reset_index()


def show(out: Path, name: str) -> None:
    """Print what stands in the folder of a set."""
    scores = pd.read_csv(out / name / "scores.csv")
    means = means_of(scores, SHOWN)
    means.insert(1, "seeds", scores.groupby("method", sort=False).size().reindex(means["method"]).to_numpy())
    table = means.sort_values("overall", ascending=False).drop(columns="kind").round(3)
    print_table(name, [str(column) for column in table], table.to_numpy().tolist())
    verdicts = pd.read_csv(out / name / "verdicts.csv")
    for row in verdicts[verdicts["best_floor"]].itertuples():
        print(f"\n{row.score}: {row.ours} {row.verdict} {row.other} ({row.difference:+.3f}, {row.low:+.3f} to {row.high:+.3f})")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--model", default="annformer-base")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in given.sets:
        if not (given.out / name / "scores.csv").is_file():
            run(given.data, name, given.out, seeds=given.seeds, methods=given.methods, model=given.model, threads=given.threads)
        show(given.out, name)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
