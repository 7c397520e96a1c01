"""Mapping onto a large reference: exact search and faiss, seconds, recall, memory.

The vectors are synthetic: types around a few lineages, each with directions of its own along which its cells vary, as embeddings of real
cells do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from _timing import machine, print_table
from annformer.tasks import _search
from annformer.tasks._search import build_lists, nearest, nearest_by_lists

N_LINEAGES, N_TYPES, N_DIRECTIONS = 20, 300, 24
AT_ONCE = 50_000


class Cells:
    """Draws vectors of length 1."""

    def __init__(self, width: int) -> None:
        rng = np.random.default_rng(0)
        lineages = rng.normal(size=(N_LINEAGES, width))
        centres = lineages[rng.integers(N_LINEAGES, size=N_TYPES)] + 0.6 * rng.normal(size=(N_TYPES, width))
        self.centres = (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
        falling = 1 / np.sqrt(1 + np.arange(N_DIRECTIONS))
        self.directions = (rng.normal(size=(N_TYPES, N_DIRECTIONS, width)) / np.sqrt(width) * falling[:, None]).astype(np.float32)
        self.shares = rng.dirichlet(np.full(N_TYPES, 0.5))

    def draw(self, n: int, seed: int) -> np.ndarray:
        """`n` cells."""
        rng, width = np.random.default_rng(seed), self.centres.shape[1]
        kinds = rng.choice(N_TYPES, size=n, p=self.shares)
        vectors = self.centres[kinds] + float(0.1 / np.sqrt(width)) * rng.standard_normal((n, width), np.float32)
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            vectors[rows] += 0.35 * rng.standard_normal((len(rows), N_DIRECTIONS), np.float32) @ self.directions[kind]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def write_reference(cells: Cells, n: int, path: Path) -> np.ndarray:
    """A reference on the disk, memory-mapped."""
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, cells.centres.shape[1]))
    for number, first in enumerate(range(0, n, AT_ONCE)):
        vectors[first : first + AT_ONCE] = cells.draw(min(AT_ONCE, n - first), seed=100 + number)
    vectors.flush()
    return np.load(path, mmap_mode="r")


def recall(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true neighbours that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, true, strict=True)]))


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` gives, its wall seconds, and the CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - wall, time.process_time() - cpu


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, search, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_cells", type=int, default=1_000_000)
    parser.add_argument("--n_queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--n", type=int, default=10, help="neighbours")
    parser.add_argument("--exact_queries", type=int, help="compare only so many exactly (the time is scaled up); all by default")
    parser.add_argument("--folder", type=Path, help="where the vectors go; by default a temporary folder")
    parser.add_argument("--probed", nargs="+", type=int, default=[_search.PROBED], help="look through one list in so many")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cells = Cells(options.width)
        parts = (write_reference(cells, options.n_cells, Path(folder) / "vectors.npy"),)
        queries = cells.draw(options.n_queries, seed=1)
        some = queries[: options.exact_queries or options.n_queries]
        true, *exact = timed(lambda: nearest(some, parts, options.n))
        rows = [["exact", *(seconds * len(queries) / len(some) for seconds in exact), 1.0, "", _gigabytes()]]
        lists, *building = timed(lambda: build_lists(parts))
        rows.append(["(building the faiss index)", *building, "", "", _gigabytes()])
        for probed in options.probed:
            _search.PROBED = probed
            found, *seconds = timed(lambda: nearest_by_lists(queries, parts, options.n, lists))
            share = recall(found.rows[: len(some)], true.rows)
            rows.append([f"faiss, {lists.nprobe} of {lists.nlist} lists", *seconds, share, share >= 0.95, _gigabytes()])
    counted = f"{options.n_queries:,} queries, {options.n_cells:,} x {options.width} vectors, {torch.get_num_threads()} threads"
    columns = ["search", "seconds", "CPU seconds", f"recall@{options.n}", "recall >= 0.95", "memory, GB"]
    print_table(f"{counted}. {machine()}.", columns, rows)


def _gigabytes() -> float:
    """Of this process now, without what is only mapped."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e9


if __name__ == "__main__":
    main()
