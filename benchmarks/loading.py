"""Reading random cells from a store; whole training batches, made in the training process or by loading processes. One thread each.

    python benchmarks/loading.py [--store STORE] [--cells 100000] [--tokens_per_step 65536]

The first table is about calls: 64 cells at a time. The second is about steps as a run has them: rows from the plan, reading, tokenizing,
packing, asking, and with loading processes the way to the training process. The third is about what recipes add: genes that are left out
because too few cells express them, and a profile of each cell; made in the training process, in turn.

Without a store one is made of synthetic counts (20,000 genes, about 1,885 expressed in a cell) in a temporary folder: one shard of 4,096
cells, listed so often that the store has the cells asked for. That is enough for the clock, as all of it lies in the page cache; a store
that does not fit into memory is as fast as its disk. The other ways read the same cells: `Table.take` is the trap that stores of this kind
fall into, a dictionary of tensors for every cell is how the original keeps them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from _timing import Timing, alternate, machine, print_table
from annformer.cli.pretrain import read_recipe
from annformer.data.store import MANIFEST, StoreSource
from annformer.data.store_writer import write_store
from annformer.genes import table_vocab
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.train.config import TrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.pretrain import prepare_data
from tokenizer import N_GENES, synthetic_counts

CELLS, CALLS, SHARD_CELLS = 64, 16, 4096
STEPS = 16
BAR = 12_000


def make_store(folder: Path, n_cells: int) -> Path:
    genes = list(table_vocab().genes[:N_GENES])
    anndata.AnnData(synthetic_counts(SHARD_CELLS), var=pd.DataFrame(index=genes)).write_h5ad(folder / "cells.h5ad")
    write_store([folder / "cells.h5ad"], folder / "store")
    file = folder / "store" / MANIFEST
    manifest = json.loads(file.read_text())
    times = -(-n_cells // manifest["n_cells"])
    manifest |= {"shards": manifest["shards"] * times, **{name: manifest[name] * times for name in ("n_cells", "n_values")}}
    file.write_text(json.dumps(manifest))
    return folder / "store"


def ways(store: StoreSource, rows: np.ndarray) -> dict[str, Callable[[int], object]]:
    """Each reads `CALLS` times `CELLS` cells; other ones in every round."""

    def batches(round_: int) -> np.ndarray:
        return rows[round_ % len(rows)]

    def read(round_: int) -> None:
        for batch in batches(round_):
            store.rows(batch)

    def read_and_tokenize(round_: int) -> None:
        for batch in batches(round_):
            tokenize(store.rows(batch), TokenizerSettings(), cls_id=store.vocab.cls_id)

    def read_in_order(round_: int) -> None:
        start = int(batches(round_)[0, 0]) % max(1, store.n_obs - CELLS * CALLS)
        for first in range(start, start + CELLS * CALLS, CELLS):
            store.rows(np.arange(first, min(first + CELLS, store.n_obs)))

    def as_tensors(round_: int) -> None:
        for row in batches(round_).ravel()[: CELLS * CALLS // 8].tolist():
            cell = store.rows([row]).counts
            {"genes": torch.from_numpy(cell.indices.astype(np.int64)), "expressions": torch.from_numpy(cell.data)}

    table = pa.concat_tables([_table(store.path / shard.file) for shard in store.manifest.shards[:100]])

    def take(round_: int) -> None:
        table.take(batches(round_)[0] % len(table))

    return {
        "read": read,
        "read + tokenize": read_and_tokenize,
        "read in order": read_in_order,
        "cell by cell, as tensors": as_tensors,
        "Table.take": take,
    }


def _table(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all().select(["gene_ids", "counts"])


N_CELLS = {"cell by cell, as tensors": CELLS * CALLS // 8, "Table.take": CELLS}


def table_rows(took: dict[str, Timing]) -> list[list[object]]:
    rows = []
    for name, timing in took.items():
        n_cells = N_CELLS.get(name, CELLS * CALLS)
        bar = BAR if name == "read + tokenize" else ""
        wall, cpu = n_cells / timing.seconds, n_cells / timing.cpu_seconds
        rows.append([name, wall, cpu, bar, wall >= BAR if bar else ""])
    return rows


class Steps:
    """Takes the steps of a run one after another, `STEPS` in every round."""

    def __init__(self, data: CellDataModule) -> None:
        self.data, workers = data, data.config.workers
        self.items = iter(data.train_dataloader()) if workers else ((step, data.step_batches(step)) for step in range(10**9))
        self.cells: list[int] = []

    def __call__(self, _round: int) -> None:
        self.cells.append(sum(tokens.n_cells for _ in range(STEPS) for tokens in next(self.items)[1]))


def training(tokens_per_step: int, **others: object) -> TrainConfig:
    return TrainConfig(epochs=1000, tokens_per_step=tokens_per_step, tokens_per_forward=32_768, **others)


def recipe_rows(store: StoreSource, tokens_per_step: int, rounds: int) -> list[list[object]]:
    """What recipes add to the steps of the table above."""
    base = read_recipe("pretrain-base", [])
    common = prepare_data(store, store.vocab, base).vocab
    short = {"max_length": base.train.max_length, "min_genes": base.train.min_genes}
    longest = base.tokenizer.max_length
    kinds = {
        "as above": (store.vocab, False, {}),
        f"genes of fewer than {base.min_cells} cells left out": (common, False, {}),
        f"and a profile, up to {longest:,} tokens a cell": (common, True, {}),
        f"and a profile, up to {base.train.max_length:,} tokens: pretrain-base": (common, True, short),
    }
    steps = {
        name: Steps(CellDataModule(store, vocab, base.tokenizer, training(tokens_per_step, **others), profile=profile))
        for name, (vocab, profile, others) in kinds.items()
    }
    took = alternate(steps, n=rounds, warm_up=2)
    rows = []
    for name, one in steps.items():
        wall, cpu = sum(one.cells[2:]) / sum(took[name].wall), sum(one.cells[2:]) / sum(took[name].cpu)
        rows.append([name, sum(one.cells) / len(one.cells) / STEPS, wall, cpu, BAR, wall >= BAR])
    return rows


def step_rows(store: StoreSource, tokens_per_step: int, rounds: int) -> list[list[object]]:
    """Each way by itself: loading processes that wait for their turn would have worked ahead."""
    rows = []
    for workers in (0, 1, 2):
        steps = Steps(CellDataModule(store, store.vocab, TokenizerSettings(), training(tokens_per_step, workers=workers)))
        took = alternate({"": steps}, n=rounds, warm_up=2)[""]
        rates = sorted(cells / seconds for cells, seconds in zip(steps.cells[2:], took.wall, strict=True))
        wall = rates[len(rates) // 2]
        in_cpu = sum(steps.cells[2:]) / sum(took.cpu)
        per_step = sum(steps.cells) / len(steps.cells) / STEPS
        del steps
        rows.append([workers, per_step, wall, in_cpu, "" if workers else BAR, "" if workers else wall >= BAR])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a store made by `annformer prepare`; by default synthetic cells")
    parser.add_argument("--cells", type=int, default=100_000, help="cells of the synthetic store")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens_per_step", type=int, nargs="+", default=[8_192, 65_536])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = StoreSource(options.store or make_store(Path(folder), options.cells))
        rows = np.random.default_rng(0).integers(store.n_obs, size=(options.rounds, CALLS, CELLS))
        took = alternate(ways(store, rows), n=options.rounds)
        title = f"{CELLS} random cells at a time from {store.n_obs:,} with {store.lengths.mean():,.0f} genes on average. One thread."
        print_table(title, ["way", "cells/s", "cells/CPU-s", "bar", "met"], table_rows(took))
        for tokens in options.tokens_per_step:
            columns = ["loading processes", "cells/step", "cells/s", "cells/CPU-s of the training process", "bar", "met"]
            print_table(f"Training batches, {tokens:,} tokens a step.", columns, step_rows(store, tokens, options.rounds))
            columns = ["cells are read", "cells/step", "cells/s", "cells/CPU-s", "bar", "met"]
            print_table(f"As recipes read, {tokens:,} tokens a step.", columns, recipe_rows(store, tokens, options.rounds))
    print(f"\nMedians of {options.rounds} alternating rounds; `Table.take` over at most 100 shards. {machine()}.")


if __name__ == "__main__":
    main()
