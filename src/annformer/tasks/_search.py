"""The nearest of many unit vectors: by comparing all of them, or the few that a faiss index proposes.

Vectors come as parts, arrays that may be memory-mapped, which count as one array from top to bottom. They are read in blocks, each once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from numpy import ndarray

from annformer.kernels import jit

QUERIES, ROWS = 512, 2_048
"""Of one matrix product: its result (4 MB) is looked through while it is in the cache."""
ROWS_AT_ONCE = 16 * ROWS
"""Rows read together: 64 MB of 512 wide."""
CANDIDATES = 2
"""So many times as many vectors as are asked for does faiss propose, from what it keeps of them; their true similarities are computed."""
LEAST_PROBED, PROBED = 12, 160
"""Lists that faiss looks through: so many, or one in so many of all."""
TRAINED_ON = 40
"""Vectors per list that the centres are found from: faiss's own least number."""

Parts = Sequence[Float[ndarray, "row width"]]


class Nearest(NamedTuple):
    """The nearest rows of each query, the nearest first."""

    rows: Int64[ndarray, "query neighbour"]
    similarities: Float32[ndarray, "query neighbour"]


def blocks(parts: Parts, size: int = ROWS_AT_ONCE) -> Iterator[tuple[int, Float32[ndarray, "row width"]]]:
    """Copies of the rows in order, with the number of the first."""
    first = 0
    for part in parts:
        for begin in range(0, len(part), size):
            yield first + begin, np.array(part[begin : begin + size], np.float32)
        first += len(part)


def nearest(queries: Float32[ndarray, "query width"], parts: Parts, n: int, *, advance: Callable[[int], None] | None = None) -> Nearest:
    """Find the `n` most similar rows of every query by comparing it with all of them.

    Parameters
    ----------
    queries
        Finite.
    n
        At most as many as there are rows.
    advance
        Called with a number of rows when all queries were compared with them.
    """
    found = Nearest(np.zeros((len(queries), n), np.int64), np.full((len(queries), n), -np.inf, np.float32))
    asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, "annformer-search", torch.set_num_threads, (1,)) as pool:
            for first, block in blocks(parts):
                rows = torch.from_numpy(block)
                chunks = [slice(begin, begin + QUERIES) for begin in range(0, len(asked), QUERIES)]
                jobs = [pool.submit(_compare, asked[c], rows, first, found.rows[c], found.similarities[c]) for c in chunks]
                for job in jobs:
                    job.result()
                if advance is not None:
                    advance(len(block))
    finally:
        torch.set_num_threads(n_threads)  # the number is partly global
    return found


def _compare(
    queries: torch.Tensor,
    rows: torch.Tensor,
    first: int,
    best_rows: Int64[ndarray, "query neighbour"],
    best: Float32[ndarray, "query neighbour"],
) -> None:
    with torch.inference_mode():
        for begin in range(0, len(rows), ROWS):
            similarities = torch.mm(queries, rows[begin : begin + ROWS].T)
            _keep_nearest(similarities.numpy(), first + begin, best_rows, best)


@jit
def _keep_nearest(
    similarities: Float32[ndarray, "query row"],
    first: int,
    best_rows: Int64[ndarray, "query neighbour"],
    best: Float32[ndarray, "query neighbour"],
) -> None:
    """Put what is larger than the least of `best` into its place there. Counting what is larger comes first, because it has no branches."""
    n_queries, n_rows = similarities.shape
    last = best.shape[1] - 1
    for q in range(n_queries):
        for begin in range(0, n_rows, 64):
            end, n_above = min(begin + 64, n_rows), 0
            least = best[q, last]
            for j in range(begin, end):
                n_above += similarities[q, j] > least
            if n_above == 0:
                continue
            for j in range(begin, end):
                value = similarities[q, j]
                if value > best[q, last]:
                    place = last
                    while place > 0 and best[q, place - 1] < value:
                        best[q, place], best_rows[q, place] = best[q, place - 1], best_rows[q, place - 1]
                        place -= 1
                    best[q, place], best_rows[q, place] = value, first + j


def seconds_to_compare(queries: Float32[ndarray, "query width"], parts: Parts, n: int) -> float:
    """Say how long `nearest` will take, from its first block and as many queries as the threads take at once."""
    some = queries[: QUERIES * torch.get_num_threads()]
    _, block = next(blocks(parts))
    nearest(some[:1], [block[:n]], n)  # compiles
    began = time.perf_counter()
    nearest(some, [block], min(n, len(block)))
    return (time.perf_counter() - began) * len(queries) / len(some) * sum(map(len, parts)) / len(block)


def similarities_to(
    queries: Float32[ndarray, "query width"], parts: Parts, rows: Int64[ndarray, "query candidate"]
) -> Float32[ndarray, "query candidate"]:
    """Similarity of every query to rows of its own; those of negative number have none (minus infinity)."""
    result = np.empty(rows.shape, np.float32)
    for begin in range(0, len(queries), 64):
        chunk = slice(begin, begin + 64)
        vectors = take(parts, np.maximum(rows[chunk], 0).reshape(-1)).reshape(*rows[chunk].shape, -1)
        result[chunk] = np.matmul(vectors, queries[chunk, :, None])[..., 0]
    result[rows < 0] = -np.inf
    return result


def take(parts: Parts, rows: Int[ndarray, "row"]) -> Float32[ndarray, "row width"]:
    """Vectors by their number."""
    result = np.empty((len(rows), parts[0].shape[1]), np.float32)
    first = 0
    for part in parts:
        inside = (rows >= first) & (rows < first + len(part))
        result[inside] = part[rows[inside] - first]
        first += len(part)
    return result


def build_lists(parts: Parts) -> Any:
    """Make a faiss index of the vectors: lists around centres, with 16 bits for every number."""
    import faiss

    n_rows, width = sum(map(len, parts)), parts[0].shape[1]
    n_lists = max(1, min(int(2 * n_rows**0.5), n_rows // TRAINED_ON))
    lists = faiss.index_factory(width, f"IVF{n_lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    chosen = np.sort(np.random.default_rng(0).choice(n_rows, min(n_rows, TRAINED_ON * n_lists), replace=False))
    faiss.omp_set_num_threads(torch.get_num_threads())
    lists.train(take(parts, chosen))
    for _, block in blocks(parts):
        lists.add(block)
    return lists


def nearest_by_lists(queries: Float32[ndarray, "query width"], parts: Parts, n: int, lists: Any) -> Nearest:
    """Find the `n` most similar rows among those in the lists nearest to each query."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    lists.nprobe = max(LEAST_PROBED, lists.nlist // PROBED)
    _, rows = lists.search(queries, CANDIDATES * n)
    similarities = similarities_to(queries, parts, rows)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :n]
    found = Nearest(np.take_along_axis(rows, order, axis=1), np.take_along_axis(similarities, order, axis=1))
    if (few := np.flatnonzero(found.rows[:, -1] < 0)).size:  # their lists hold fewer than n
        found.rows[few], found.similarities[few] = nearest(queries[few], parts, n)
    return found
