"""Peak memory of `annformer.embed_file` and of `annformer prepare` against the number of cells: it should not grow with them.

    python benchmarks/memory.py [embed|prepare] [--cells 20000 200000] [--content all] [--memory_gb 0.05]

Makes h5ad files of synthetic counts (2,000 genes, about 200 expressed in a cell) in a temporary folder, embeds each in a process of its own
with a random network of 1 layer, 32 wide, or writes it as a shuffled store, and prints one table. What may grow with the cells is said in
the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

from annformer.genes import table_vocab

N_GENES, EXPRESSED, BLOCK = 2_000, 200, 2_000
GENES = np.array(table_vocab().genes[:N_GENES], dtype=object)

PEAK = """
import json, re, sys, time
import annformer as af

def peak():
    with open("/proc/self/status") as status:  # ru_maxrss would begin with the peak of the parent
        return int(re.search(r"VmHWM:\\s*(\\d+)", status.read())[1]) / 1024
"""
TOLD = """
print(json.dumps({"before": before, "peak": peak(), "seconds": time.perf_counter() - began}))
"""
EMBED = """
content, threads = sys.argv[1], int(sys.argv[2])
model = af.ScGPT.from_pretrained("model")
import annformer.tasks.embedding
before, began = peak(), time.perf_counter()
af.embed_file("cells.h5ad", "out.h5ad", model=model, content=content, threads=threads, progress=False)
"""
PREPARE = """
from annformer.data.store_writer import write_store
before, began = peak(), time.perf_counter()
write_store(["cells.h5ad"], "store", memory_gb=float(sys.argv[1]))
"""
HELD = {
    "embed": "per cell are held: its name, where its values begin, whether it is empty",
    "prepare": "per cell are held: a hash by which doubles are found, and in one bucket at a time the cells themselves",
}


def write_cells(path: Path, n_cells: int) -> None:
    """An h5ad as AnnData writes it, block by block."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for table, names in (("obs", np.array([f"cell-{i}" for i in range(n_cells)], dtype=object)), ("var", GENES)):
            group = file.create_group(table)
            group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            group.attrs["column-order"] = np.array([], dtype=h5py.string_dtype())
            index = group.create_dataset("_index", data=names, dtype=h5py.string_dtype())
            index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, N_GENES)})
        lengths = rng.integers(EXPRESSED // 2, EXPRESSED * 3 // 2, size=n_cells)
        x["indptr"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        data = x.create_dataset("data", shape=(lengths.sum(),), dtype="f4", chunks=(1 << 16,))
        indices = x.create_dataset("indices", shape=(lengths.sum(),), dtype="i4", chunks=(1 << 16,))
        end = 0
        for first in range(0, n_cells, BLOCK):
            block = lengths[first : first + BLOCK]
            chosen = np.argpartition(rng.random((len(block), N_GENES), dtype=np.float32), EXPRESSED * 3 // 2, axis=1).astype(np.int32)
            kept = np.concatenate([np.sort(row[:n]) for row, n in zip(chosen, block, strict=True)])
            begin, end = end, end + len(kept)
            data[begin:end], indices[begin:end] = rng.geometric(0.4, size=len(kept)), kept


def write_model(folder: Path) -> None:
    import annformer as af
    from annformer.scgpt import ModelFolderConfig

    vocab = af.GeneVocab(list(GENES)).with_specials()
    network = af.ModelConfig(vocab_size=len(vocab), width=32, n_heads=4, n_layers=1, ff_width=32)
    af.ScGPT(ModelFolderConfig(model=network), vocab).save_pretrained(folder)


def measure(what: str, n_cells: int, words: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cells(folder / "cells.h5ad", n_cells)
        if what == "embed":
            write_model(folder / "model")
        code = PEAK + {"embed": EMBED, "prepare": PREPARE}[what] + TOLD
        command = [sys.executable, "-W", "ignore", "-c", code, *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return json.loads(done.stdout) | {"file": (folder / "cells.h5ad").stat().st_size / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["embed", "prepare"], default="embed")
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--content", choices=["all", "embedding"], default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory_gb", type=float, default=0.05, help="of prepare, for one bucket")
    options = parser.parse_args()
    words = [options.content, str(options.threads)] if options.what == "embed" else [str(options.memory_gb)]
    results = {}
    print("| cells | file MiB | before MiB | peak MiB | seconds | cells/s |\n|---|---|---|---|---|---|")
    for n in options.cells:
        results[n] = row = measure(options.what, n, words)
        figures = f"{row['file']:.0f} | {row['before']:.0f} | {row['peak']:.0f} | {row['seconds']:.0f} | {n / row['seconds']:.0f}"
        print(f"| {n:,} | {figures} |", flush=True)
    few, many = min(results), max(results)
    growth = results[many]["peak"] - results[few]["peak"]
    print(f"\ngrowth from {few:,} to {many:,} cells: {growth:.0f} MiB, {growth * 2**20 / (many - few):.0f} bytes per cell")
    print(HELD[options.what])


if __name__ == "__main__":
    main()
