"""Bucket files: where cells wait, scattered by their keys, until each bucket is sorted in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64
from scipy.sparse import csr_array

_HEADER: Final = np.dtype([("n_cells", "<i8"), ("n_values", "<i8")])


class Cells(NamedTuple):
    """Cells in a row."""

    facts: np.ndarray
    """A record for every cell: `key`, `source`, `row`, `length` and a code for every label column (`c0`, `c1` ...)."""
    gene_ids: Int[np.ndarray, "value"]
    counts: Float[np.ndarray, "value"]

    @property
    def n_bytes(self) -> int:
        """Memory in use."""
        return self.facts.nbytes + self.gene_ids.nbytes + self.counts.nbytes

    def take(self, order: Int[np.ndarray, "cell"]) -> Cells:
        """Return the given cells in this order."""
        indptr = np.concatenate([[0], np.cumsum(self.facts["length"], dtype=np.int64)])
        n_columns = int(self.gene_ids.max(initial=0)) + 1
        table = csr_array((self.counts, self.gene_ids, indptr.astype(np.int32)), shape=(len(self.facts), n_columns))
        taken = table[order]
        return Cells(self.facts[order], taken.indices, taken.data)


def facts_type(n_labels: int) -> np.dtype:
    """Type of `Cells.facts` for that many label columns."""
    labels = [(f"c{i}", "<i4") for i in range(n_labels)]
    return np.dtype([("key", "<u8"), ("row", "<i8"), ("source", "<i4"), ("length", "<i4"), *labels])


class Buckets:
    """Files that cells are appended to by key: bucket i gets the i-th range of keys, so buckets one after the other are sorted by key.

    Parameters
    ----------
    folder
        Must exist.
    n
        Number of buckets.
    n_labels
        Label columns of a cell.
    """

    def __init__(self, folder: Path, n: int, n_labels: int) -> None:
        self.folder, self.n, self._type = folder, n, facts_type(n_labels)
        self._waiting: list[list[Cells]] = [[] for _ in range(n)]
        self.n_waiting = 0
        """Bytes that are not yet written."""

    def add(self, cells: Cells) -> None:
        """Deal cells out to the buckets; equal keys go to the same one."""
        bucket = _bucket_of(cells.facts["key"], self.n)
        order = np.argsort(bucket, kind="stable")
        dealt = cells.take(order)
        ends = np.searchsorted(bucket[order], np.arange(self.n), side="right")
        values = np.concatenate([[0], np.cumsum(dealt.facts["length"], dtype=np.int64)])
        begin = 0
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                part = slice(values[begin], values[end])
                self._waiting[number].append(Cells(dealt.facts[begin:end], dealt.gene_ids[part], dealt.counts[part]))
            begin = end
        self.n_waiting += dealt.n_bytes

    def flush(self) -> list[int]:
        """Put everything on the disk; return the sizes of the files."""
        sizes = []
        for number, waiting in enumerate(self._waiting):
            path = self._path(number)
            if waiting:
                with path.open("ab") as file:
                    for cells in waiting:
                        _write(file, cells)
                    file.flush()
                    os.fsync(file.fileno())
                waiting.clear()
            sizes.append(path.stat().st_size if path.exists() else 0)
        self.n_waiting = 0
        return sizes

    def cut(self, sizes: Sequence[int]) -> None:
        """Cut the files back to `sizes`: what an interrupted run wrote after its last journal goes."""
        for number, size in enumerate(sizes):
            path = self._path(number)
            if path.exists():
                os.truncate(path, size)

    def load(self, number: int) -> Cells:
        """Read one bucket, in the order in which its cells came."""
        parts = []
        path = self._path(number)
        if path.exists():
            with path.open("rb") as file:
                while header := file.read(_HEADER.itemsize):
                    n_cells, n_values = np.frombuffer(header, dtype=_HEADER)[0].item()
                    facts, ids, counts = (np.fromfile(file, t, n) for t, n in ((self._type, n_cells), ("<i4", n_values), ("<f4", n_values)))
                    parts.append(Cells(facts, ids, counts))
        if not parts:
            return Cells(np.empty(0, self._type), np.empty(0, np.int32), np.empty(0, np.float32))
        return parts[0] if len(parts) == 1 else Cells(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def remove(self, number: int) -> None:
        """Delete one bucket."""
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"bucket-{number:05d}"


def _bucket_of(keys: UInt64[np.ndarray, "cell"], n: int) -> Int[np.ndarray, "cell"]:
    return ((keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def _write(file: object, cells: Cells) -> None:
    header = np.array([(len(cells.facts), len(cells.gene_ids))], dtype=_HEADER)
    for array in (header, cells.facts, cells.gene_ids, cells.counts):
        file.write(np.ascontiguousarray(array).data)  # type: ignore[attr-defined]


def by_key(cells: Cells) -> tuple[Cells, Int[np.ndarray, "dropped"]]:
    """Sort a bucket by key and drop duplicates: of cells with the same key the one that came first stays.

    Returns
    -------
    The cells that stay, and the sources of those that were dropped.
    """
    order = np.argsort(cells.facts["key"], kind="stable")
    keys = cells.facts["key"][order]
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[1:] = keys[1:] == keys[:-1]
    return cells.take(order[~repeated]), cells.facts["source"][order[repeated]]
