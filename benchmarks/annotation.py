"""Cell type annotation of real sets by annformer and by the simple methods: scores, time, verdicts.

    python benchmarks/annotation.py --data FOLDER [--sets pbmc3k ...] [--seeds 3] [--methods ...] --out FOLDER

FOLDER holds the sets as .h5ad files with obs "cell_type", and "batch" where whole batches are to be held out. What `annformer compare
annotate` would say of each set stands in --out; sets that are there already are not run again.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import pandas as pd

from _timing import machine, print_table
from annformer.cli.compare import write
from annformer.comparison.annotate import compare_annotation
from integration import means_of, read

SETS = {
    "lymphnode_11types": None,
    "blood_treg_tconv": "batch",
    "headneck_tumour_chetah": None,
    "pancreas_baron_cider_human": "batch",
    "brain_dlpfc_nuclei500": "batch",
    "pancreas_3studies": "batch",
    "zheng_sorted_safe500": None,
    "zheng_facs_garnett800": None,
    "zheng_sorted_mudan": None,
    "pbmc4k_scvi_labels": None,
    "sc_mixology_lung_cell_lines": "batch",
    "pbmc3k": None,
    "kang_ifnb_pbmc": None,
    "kang_muscat_8donors": "batch",
    "pbmc_integration_4batch": "batch",
    "breast_cell_lines_31": None,
}
"""Set -> the column whose groups are held out; None: cells at random, in five folds."""
SHOWN = ("macro_f1", "accuracy", "ece", "coverage", "seconds", "memory_mb")


def run(data: Path, name: str, out: Path, *, seeds: int, methods: list[str] | None, model: str, threads: int | None, novelty: bool) -> None:
    """Compare on one set, and leave the tables and the page in `out`; goes on where an earlier start stopped."""
    unfinished = out / f".{name}.comparing"
    adata = read(data, name)
    found = compare_annotation(
        adata,
        label_key="cell_type",
        batch_key=SETS.get(name),
        model=model,
        seeds=range(seeds),
        wanted=methods,
        name=name,
        command=f"python benchmarks/annotation.py --sets {name} --seeds {seeds}",
        threads=threads,
        folder=unfinished,
        novelty=novelty,
    )
    write(found, adata, out / name)
    shutil.rmtree(unfinished, ignore_errors=True)


def show(out: Path, name: str) -> None:
    """Print what stands in the folder of a set."""
    scores = pd.read_csv(out / name / "scores.csv")
    for split, part in scores.groupby("split", sort=False):
        means = means_of(part, SHOWN)
        means.insert(1, "seeds", part.groupby("method", sort=False).size().reindex(means["method"]).to_numpy())
        table = means.sort_values("macro_f1", ascending=False).drop(columns="kind").round(3)
        print_table(f"{name}, {split}", [str(column) for column in table], table.to_numpy().tolist())
    verdicts = pd.read_csv(out / name / "verdicts.csv")
    for row in verdicts[verdicts["best_floor"]].itertuples():
        print(f"\n{row.score}: {row.ours} {row.verdict} {row.other} ({row.difference:+.3f}, {row.low:+.3f} to {row.high:+.3f})")
    show_novelty(out / name, name)


def show_novelty(folder: Path, name: str) -> None:
    """Print how well types stand out that were left out, with 95 % intervals, where that was looked at."""
    means = folder / "novelty_mean.csv"
    if means.is_file() and len(mean := pd.read_csv(means)):
        columns = ["label", "method", "n", "auroc", "low", "high"]
        table = pd.concat([pd.read_csv(folder / "novelty.csv"), mean.assign(label="mean of types")])[columns]
        print_table(f"{name}, novelty (AUROC) of types left out", columns, table.round(3).to_numpy().tolist())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--model", default="annformer-base")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--novelty", action="store_true", help="leave each type out once as well, which takes as many fits")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in given.sets:
        if not (given.out / name / "scores.csv").is_file():
            options = {"seeds": given.seeds, "methods": given.methods, "model": given.model, "threads": given.threads}
            run(given.data, name, given.out, **options, novelty=given.novelty)
        show(given.out, name)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
