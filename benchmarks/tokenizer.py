"""Cells to tokens and masking, against the original's way, which bins, samples and pads one cell at a time. One thread.

    python benchmarks/tokenizer.py [--data FOLDER]      # FOLDER holds pbmc3k.h5ad, or cells/pbmc3k.h5ad

CPU seconds of the one thread, which other work on the machine hardly touches. Two originals: "dense rows" is what it does (non-zero genes
of dense rows, then its collator); "CSR slices" spares it the search for the non-zero genes. Ratios are to the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array, vstack

from _timing import Timing, alternate, cpu_ratio, machine, print_table, ratio
from annformer.masking import ask, hide_values
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.tokens import CellBatch, TokenBatch
from original import PAD_VALUE, CellDataset, Collator, prove_binning, prove_collator

N_GENES, CLS_ID, PAD_ID = 20_000, 100_000, 100_001
FEW, MANY = 64, 4096
CALLS = 16  # of FEW cells: a block long enough for the clock
BARS = {("counts", FEW): 20, ("counts", MANY): 30, ("floats", FEW): 12, ("floats", MANY): 12}
MASKING_BAR = 20_000
SETTINGS = TokenizerSettings()


def synthetic_counts(n_cells: int, seed: int = 0) -> csr_array:
    """Poisson counts of genes whose abundance spreads over five decades; about 1,885 genes of 20,000 in a cell."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 1.6, N_GENES)
    mean = 2570 * share / share.sum()
    blocks = [rng.poisson(mean * rng.lognormal(0, 0.3, (256, 1))).astype(np.float32) for _ in range(n_cells // 256)]
    return vstack([csr_array(block) for block in blocks], format="csr")


def real_counts(folder: Path, n_cells: int) -> csr_array:
    """As many real cells, by repetition."""
    import anndata

    path = next(path for path in (folder / "pbmc3k.h5ad", folder / "cells" / "pbmc3k.h5ad") if path.exists())
    counts = csr_array(anndata.read_h5ad(path).X)
    counts.eliminate_zeros()
    return counts[np.arange(n_cells) % counts.shape[0]]


def log_normalised(counts: csr_array) -> csr_array:
    totals = np.repeat(counts.sum(1), np.diff(counts.indptr))
    return csr_array((np.log1p(counts.data * (1e4 / totals)).astype(np.float32), counts.indices, counts.indptr), counts.shape)


def distinct_floats(counts: csr_array) -> csr_array:
    noise = np.random.default_rng(1).random(counts.nnz, np.float32)
    return csr_array((counts.data + noise, counts.indices, counts.indptr), counts.shape)


def as_original(rows: ndarray, round_: int) -> dict[str, torch.Tensor]:
    """One batch as the original prepares it from dense rows."""
    dataset = CellDataset(rows[round_ * FEW : (round_ + 1) * FEW], np.arange(rows.shape[1]), CLS_ID)
    return Collator(PAD_ID, SETTINGS.max_length)([dataset[cell] for cell in range(FEW)])


def as_original_sliced(counts: csr_array, round_: int) -> dict[str, torch.Tensor]:
    """The same from slices of a CSR matrix."""
    cells = []
    for cell in range(round_ * FEW, (round_ + 1) * FEW):
        entries = slice(counts.indptr[cell], counts.indptr[cell + 1])
        genes = np.insert(counts.indices[entries].astype(np.int64), 0, CLS_ID)
        values = np.insert(counts.data[entries], 0, PAD_VALUE)
        cells.append({"genes": torch.from_numpy(genes), "expressions": torch.from_numpy(values).float()})
    return Collator(PAD_ID, SETTINGS.max_length)(cells)


def ours(batches: list[CellBatch], _: int, settings: TokenizerSettings = SETTINGS) -> list[TokenBatch]:
    return [tokenize(batch, settings, cls_id=CLS_ID) for batch in batches]


def cells_of(counts: csr_array) -> CellBatch:
    return CellBatch(counts, np.arange(counts.shape[1]), np.arange(counts.shape[0]), {})


def per_cell(timing: Timing, n_cells: int) -> Timing:
    return Timing([seconds / n_cells for seconds in timing.wall], [seconds / n_cells for seconds in timing.cpu])


def tokenizing_rows(name: str, counts: csr_array, rounds: int) -> Iterator[list[object]]:
    few = [cells_of(counts[i * FEW : (i + 1) * FEW]) for i in range(CALLS)]
    many = [cells_of(counts)]
    took = alternate(
        {
            "dense": partial(as_original, counts[: FEW * rounds].toarray()),
            "few": partial(ours, few),
            "sliced": partial(as_original_sliced, counts),
            "many": partial(ours, many),
        },
        n=rounds,
    )
    theirs, sliced = per_cell(took["dense"], FEW), per_cell(took["sliced"], FEW)
    for n_cells, mine in ((FEW, per_cell(took["few"], FEW * CALLS)), (MANY, per_cell(took["many"], MANY))):
        bar, found = BARS.get((name, n_cells), ""), cpu_ratio(theirs, mine)
        met = found >= bar if bar else ""
        speeds = [1 / timing.cpu_seconds for timing in (theirs, sliced, mine)]
        yield [name, counts.nnz // counts.shape[0], n_cells, *speeds, found, ratio(theirs, mine), bar, met]


def zeros_rows(counts: csr_array, rounds: int) -> Iterator[list[object]]:
    batches = {FEW: [cells_of(counts[i * FEW : (i + 1) * FEW]) for i in range(CALLS)], MANY: [cells_of(counts)]}
    for zeros in (1.0, "all"):
        settings = SETTINGS.with_(zeros=zeros)
        ways = {str(n_cells): partial(ours, some, settings=settings) for n_cells, some in batches.items()}
        for (n_cells, some), timing in zip(batches.items(), alternate(ways, n=rounds).values(), strict=True):
            speed = 1 / per_cell(timing, n_cells * len(some)).cpu_seconds
            yield [f"counts, zeros {zeros}", counts.nnz // counts.shape[0], n_cells, "", "", speed, "", "", "", ""]


def masking_rows(counts: csr_array, rounds: int) -> Iterator[list[object]]:
    tokens = tokenize(cells_of(counts[:FEW]), SETTINGS, cls_id=CLS_ID)
    ways = {
        "hide_values": lambda step: [hide_values(tokens, 0.4, seed=0, step=step) for _ in range(CALLS)],
        "ask": lambda step: [ask(tokens, [0.25, 0.5, 0.75], seed=0, step=step) for _ in range(CALLS)],
    }
    for name, timing in alternate(ways, n=rounds).items():
        speed = 1 / per_cell(timing, FEW * CALLS).cpu_seconds
        yield [name, tokens.n_tokens // FEW, FEW, "", "", speed, "", "", f"{MASKING_BAR:,}/s", speed >= MASKING_BAR]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prove, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with pbmc3k.h5ad: adds real cells")
    parser.add_argument(
        "--parity", type=Path, default=Path(__file__).parents[1] / "tests" / "golden", help="folder with binning/, tokenization/"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if prove_binning(options.parity) or prove_collator(options.parity):
        sys.exit("benchmarks/original.py does not reproduce the original's bins and batches: no ratio is printed")
    torch.set_num_threads(1)
    counts = synthetic_counts(MANY)
    sets = {"counts": counts, "log-normalised": log_normalised(counts), "floats": distinct_floats(counts)}
    if options.data:
        sets["pbmc3k counts"] = real_counts(options.data, MANY)
    rows = [row for name, cells in sets.items() for row in tokenizing_rows(name, cells, options.rounds)]
    rows += zeros_rows(counts, options.rounds)
    rows += masking_rows(counts, options.rounds)
    speeds = ["dense rows, cells/CPU-s", "CSR slices, cells/CPU-s", "annformer, cells/CPU-s"]
    columns = ["values", "genes / cell", "cells / call", *speeds, "ratio", "ratio (wall)", "bar", "met"]
    print_table("Tokenizing, at most 1,200 tokens a cell; masking. One thread.", columns, rows)
    print(f"\nMedians of {options.rounds} alternating rounds. {machine()}.")
    print("The imitation of the original reproduces its golden bins and batches exactly.")


if __name__ == "__main__":
    main()
