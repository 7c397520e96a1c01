"""Buckets of cells -> one shard: sorted by key, without duplicates, as an Arrow IPC stream; and the table of genes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from annformer.data.store_buckets import Cells, by_key
from annformer.data.store_manifest import Shard
from annformer.data.studies import file_sha256
from annformer.kernels import jit
from annformer.vocab import GeneVocab


class ShardWriter:
    """Writes shards into a folder, and for each a tally of its genes into another.

    Parameters
    ----------
    columns
        Label columns, in the order of the codes in `Cells.facts`.
    n_tokens
        Size of the vocabulary.
    folder
        Where shards go; must exist.
    tallies
        Where tallies go; must exist.
    """

    def __init__(self, columns: Sequence[str], n_tokens: int, folder: Path, tallies: Path) -> None:
        self.columns, self.n_tokens, self.folder, self.tallies = tuple(columns), n_tokens, folder, tallies
        # a stream, not a file with a footer: every version of the datasets package opens it, and it can be mapped as well
        self.schema = pa.schema(
            [
                ("gene_ids", pa.list_(pa.int32())),
                ("counts", pa.list_(pa.float32())),
                *((column, pa.int32()) for column in columns),
                ("source", pa.int32()),
                ("row", pa.int64()),
            ]
        )

    def write(self, number: int, buckets: Iterator[Cells]) -> tuple[Shard, Int[np.ndarray, "dropped"]]:
        """Write one shard, a record batch for every bucket that holds cells.

        Returns
        -------
        The shard, and the source of every cell that was dropped because it is a duplicate.
        """
        path = self.folder / f"shard-{number:05d}.arrow"
        tally, dropped, n_cells = np.zeros((2, self.n_tokens)), [np.empty(0, dtype=np.int64)], 0
        with path.open("wb") as file:
            with pa.ipc.new_stream(file, self.schema) as stream:
                for bucket in buckets:
                    cells, sources = by_key(bucket)
                    del bucket  # as large as its sorted copy
                    dropped.append(sources)
                    if len(cells.facts):
                        stream.write_batch(self._batch(cells))
                        n_cells += len(cells.facts)
                        _count(cells.gene_ids, cells.counts, tally)
            file.flush()
            os.fsync(file.fileno())
        np.save(self._tally(number), tally)
        n_bytes = path.stat().st_size
        shard = Shard(file=path.name, n_cells=n_cells, n_values=int(tally[0].sum()), n_bytes=n_bytes, sha256=file_sha256(path))
        return shard, np.concatenate(dropped)

    def write_genes(self, vocab: GeneVocab, n_shards: int) -> int:
        """Write `genes.tsv`: for every gene its id, its cells, the sum of its counts; return how many genes are expressed at all."""
        tally = np.sum([np.load(self._tally(number)) for number in range(n_shards)], axis=0)
        lines = ["id\tgene\tn_cells\ttotal\n"]
        lines += [f"{i}\t{token}\t{tally[0, i]:.0f}\t{tally[1, i]:.10g}\n" for i, token in enumerate(vocab.tokens) if vocab.is_gene[i]]
        (self.folder / "genes.tsv").write_text("".join(lines), encoding="utf-8")
        return int((tally[0] > 0).sum())

    def _tally(self, number: int) -> Path:
        return self.tallies / f"tally-{number:05d}.npy"

    def _batch(self, cells: Cells) -> pa.RecordBatch:
        offsets = pa.array(np.concatenate([[0], np.cumsum(cells.facts["length"], dtype=np.int64)]).astype(np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (cells.gene_ids, cells.counts)]
        names = [*(f"c{i}" for i in range(len(self.columns))), "source", "row"]
        return pa.record_batch([*lists, *(pa.array(np.ascontiguousarray(cells.facts[name])) for name in names)], schema=self.schema)


@jit
def _count(gene_ids: Any, counts: Any, tally: Any) -> None:
    """Add, for every gene, the cells that express it and its counts; `np.bincount` would first make wider copies of both."""
    for k in range(len(gene_ids)):
        tally[0, gene_ids[k]] += 1
        tally[1, gene_ids[k]] += counts[k]
