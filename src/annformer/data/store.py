"""The on-disk corpus for pretraining: memory-mapped Arrow shards of shuffled cells, read at random through views.

A store is a folder: `manifest.json`, `vocab.json`, `genes.tsv` and shards, each an Arrow IPC stream with a row for every cell: `gene_ids`
(ascending ids of `vocab.json`), `counts`, a code for every label column (what it stands for is in the manifest), and where the cell came
from (`source`, `row`). `store_writer.write_store` makes it; `datasets.load_dataset("arrow", data_files="STORE/*.arrow")` opens it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from annformer.config import Config
from annformer.data.collapse import Rows, collapse
from annformer.data.studies import file_sha256
from annformer.data.tables import unknown_name
from annformer.errors import InputError, input_error
from annformer.genes import GeneMatch, match_genes
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
OWN_COLUMNS: Final = ("gene_ids", "counts", "source", "row")
"""Columns of a shard that are not labels."""


class Shard(Config):
    """One file of cells."""

    file: str
    n_cells: int
    n_values: int
    n_bytes: int
    sha256: str


class SourceRecord(Config):
    """One data set that the store was made of, and what became of its cells."""

    file: str
    name: str
    """The file's name, with as many folders before it as tell it from the others."""
    n_bytes: int
    sha256: str
    counts_from: str
    """Which matrix was read."""
    kind: Literal["counts", "log-normalised", "normalised"]
    n_cells: int
    n_kept: int
    n_empty: int
    """Cells without any gene of the store."""
    n_duplicates: int
    """Cells whose counts equal those of a cell that was kept."""
    n_excluded: int
    """Cells left out because a held-out data set has them."""
    found_in: dict[str, int]
    """These cells by held-out data set; one may count for several."""
    genes: dict[str, Any]
    """The match report."""


class HeldOutRecord(Config):
    """One data set whose cells the store must not hold."""

    file: str
    name: str
    """The file's name, with as many folders before it as tell it from the others."""
    n_bytes: int
    sha256: str
    n_found: int
    """Cells of the sources that were recognised as cells of this data set."""


class StoreManifest(Config):
    """What a store holds and how it came about."""

    format: Literal[1]
    version: str
    """Of annformer."""
    seed: int
    n_cells: int
    n_values: int
    """Gene-count pairs."""
    n_genes: int
    """Genes of the vocabulary that some cell expresses."""
    columns: dict[str, list[str]]
    """For each label column what its codes stand for."""
    shards: list[Shard]
    sources: list[SourceRecord]
    held_out: list[HeldOutRecord]


class _Part(NamedTuple):
    """A record batch as views of the mapped file."""

    offsets: Int[np.ndarray, "cell+1"]
    gene_ids: Int[np.ndarray, "value"]
    counts: Float[np.ndarray, "value"]
    codes: dict[str, Int[np.ndarray, "cell"]]
    """Of every label column, `source` and `row`."""


class StoreSource:
    """Cells of a store, in any order, at the speed of copying them.

    Opening compares the sizes of the shards with the manifest; `verify` compares their hashes. Memory-mapped: processes that open the same
    store share its pages. Can be pickled.

    Parameters
    ----------
    path
        Folder that `write_store` made.

    Attributes
    ----------
    vocab
        Genes of the store and the special tokens.
    categories
        For every role in a `label_keys` that was used, the category that each code stands for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = _read_manifest(self.path)
        self.vocab = GeneVocab.from_json(self.path / "vocab.json")
        self.categories: dict[str, tuple[str, ...]] = {}
        _require_sizes(self.path, self.manifest.shards)
        mapped = {shard.file: _open_shard(self.path / shard.file, list(self.manifest.columns)) for shard in self.manifest.shards}
        self._parts = [part for shard in self.manifest.shards for part in mapped[shard.file]]
        self._starts = np.cumsum([0, *(len(part.offsets) - 1 for part in self._parts)])
        found, told = int(self._starts[-1]), self.manifest.n_cells
        if found != told:
            raise _damaged(self.path, f"its shards hold {found:,} cells, its manifest says {told:,}")
        self._tables: dict[GeneVocab, tuple[np.ndarray, np.ndarray]] = {}

    def __reduce__(self) -> tuple[type[StoreSource], tuple[Path]]:
        return StoreSource, (self.path,)

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> Int[np.ndarray, "cell"]:
        """Expressed genes of every cell."""
        return np.concatenate([np.diff(part.offsets) for part in self._parts])

    @cached_property
    def obs_names(self) -> np.ndarray:
        """Name of every cell: its study and its row there."""
        return np.array(self.names(np.arange(self.n_obs)), dtype=object)

    def names(self, rows: Sequence[int] | Int[np.ndarray, "cell"]) -> list[str]:
        """Where cells came from, for messages: file and row in it."""
        sources, where = self.codes("source", rows), self.codes("row", rows)
        return [f"{self.manifest.sources[source].file}:{row}" for source, row in zip(sources, where, strict=True)]

    def codes(self, column: str, rows: Sequence[int] | Int[np.ndarray, "cell"] | None = None) -> Int[np.ndarray, "cell"]:
        """Integer codes of a label column (or `source`, `row`), of all cells or of some."""
        if column not in (*self.manifest.columns, "source", "row"):
            found = f"the store {self.path} has no column {column!r}"
            raise unknown_name(found, column, list(self.manifest.columns), "one of", "the column")
        if rows is None:
            return np.concatenate([part.codes[column] for part in self._parts]).astype(np.int64)
        places = self._places(np.asarray(rows, dtype=np.int64))
        return np.array([self._parts[part].codes[column][row] for part, row in places], dtype=np.int64)

    def match(self, vocab: GeneVocab) -> GeneMatch:
        """Find the genes of the store in `vocab`; refuses when too few are found."""
        match = match_genes(self.vocab.genes, vocab)
        match.require()
        return match

    def rows(
        self,
        rows: Sequence[int] | Int[np.ndarray, "cell"],
        *,
        vocab: GeneVocab | None = None,
        label_keys: Mapping[str, str] | None = None,
    ) -> CellBatch:
        """Read the given cells, in this order.

        Parameters
        ----------
        vocab
            Vocabulary whose ids the batch carries; None, and fastest: the store's own.
        label_keys
            For each role (`batch`, `cell_type`, ...) the column whose codes go into `labels`; see `categories`.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        ids, counts = [], []
        for number, row in self._places(wanted):
            part = self._parts[number]
            begin, end = part.offsets[row], part.offsets[row + 1]
            ids.append(part.gene_ids[begin:end])
            counts.append(part.counts[begin:end])
        indptr = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(values) for values in counts], out=indptr[1:])
        assert indptr[-1] < 2**31, "a batch holds fewer than 2**31 values"
        stored = Rows(indptr.astype(np.int32), _joined(ids, np.int32), _joined(counts, np.float32))
        cells, gene_ids = self._over(stored, self.vocab if vocab is None else vocab)
        labels = {}
        for role, column in (label_keys or {}).items():
            labels[role] = self.codes(column, wanted)
            self.categories[role] = tuple(self.manifest.columns[column])
        return CellBatch(cells, gene_ids, wanted, labels)

    def batches(
        self,
        size: int,
        *,
        vocab: GeneVocab,
        label_keys: Mapping[str, str] | None = None,
        rows: Int[np.ndarray, "cell"] | None = None,
        start: int = 0,
    ) -> Iterator[CellBatch]:
        """Yield cells `size` at a time, as every `CellSource` does; any order of `rows` is fast."""
        assert size >= 1, "a batch has at least one cell"
        wanted = (np.arange(self.n_obs) if rows is None else np.asarray(rows, dtype=np.int64))[start:]
        for first in range(0, len(wanted), size):
            yield self.rows(wanted[first : first + size], vocab=vocab, label_keys=label_keys)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compare every shard with its hash; do so before a long run.

        Parameters
        ----------
        progress
            Called with the bytes read and their total.

        Raises
        ------
        InputError
            Naming every shard that is not what was written.
        """
        bad, done = [], 0
        shards = {shard.file: shard for shard in self.manifest.shards}
        total = sum(shard.n_bytes for shard in shards.values())
        for shard in shards.values():
            if file_sha256(self.path / shard.file) != shard.sha256:
                bad.append(shard.file)
            done += shard.n_bytes
            if progress is not None:
                progress(done, total)
        if bad:
            raise _damaged(self.path, f"{len(bad)} of its {len(shards)} shards are not what was written: {', '.join(bad)}")

    def _places(self, rows: Int[np.ndarray, "cell"]) -> Iterator[tuple[int, int]]:
        """Part of every cell, and its row there."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n_obs):
            msg = f"rows from {rows.min()} to {rows.max()} of a store of {self.n_obs} cells"
            raise IndexError(msg)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        return zip(parts.tolist(), (rows - self._starts[parts]).tolist(), strict=True)

    def _over(self, stored: Rows, vocab: GeneVocab) -> tuple[csr_array, Int[np.ndarray, "gene"]]:
        if vocab is self.vocab or vocab == self.vocab:
            counts, gene_ids = stored, np.arange(len(self.vocab))
        else:
            slots, gene_ids = self._slots(vocab)
            changed = collapse(stored, slots, len(gene_ids))
            counts = Rows(changed.indptr, changed.indices, changed.data)
        cells = csr_array((counts.data, counts.indices, counts.indptr), shape=(len(counts.indptr) - 1, len(gene_ids)))
        cells.has_canonical_format = True
        return cells, gene_ids

    def _slots(self, vocab: GeneVocab) -> tuple[Int[np.ndarray, "token"], Int[np.ndarray, "gene"]]:
        """For every id of the store its place among the genes that `vocab` has, and the ids of these."""
        if vocab not in self._tables:
            ids = np.full(len(self.vocab), -1, dtype=np.int64)
            ids[self.vocab.is_gene] = self.match(vocab).ids
            gene_ids, place = np.unique(ids[ids >= 0], return_inverse=True)
            slots = np.full(len(ids), -1, dtype=np.int32)
            slots[ids >= 0] = place
            self._tables[vocab] = slots, gene_ids
        return self._tables[vocab]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


def _read_manifest(path: Path) -> StoreManifest:
    file = path / MANIFEST
    if not file.is_file():
        partial = path.with_name(path.name + ".partial").is_dir()
        found = f"{path} is not a store" + ("; it is still unfinished" if partial else f": it has no {MANIFEST}")
        remedy = "run the same `annformer prepare` with --resume" if partial else "make one with `annformer prepare`"
        raise input_error(found, "a folder made by `annformer prepare`", remedy)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, f"{MANIFEST} is not JSON ({error})") from None
    if isinstance(values, dict) and values.get("format") != FORMAT:
        found = f"the store {path} has format {values.get('format')!r}"
        raise input_error(found, f"format {FORMAT}", "make it again with this version of annformer, or use the version that made it")
    return StoreManifest.read(values, where=str(file))


def _require_sizes(path: Path, shards: Sequence[Shard]) -> None:
    for shard in shards:
        file = path / shard.file
        size = file.stat().st_size if file.is_file() else None
        if size != shard.n_bytes:
            what = "is missing" if size is None else f"has {size:,} bytes, its manifest says {shard.n_bytes:,}"
            raise _damaged(path, f"its shard {shard.file} {what}")


def _open_shard(path: Path, columns: list[str]) -> list[_Part]:
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            return [_part(batch, columns) for batch in stream]
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise _damaged(path.parent, f"its shard {path.name} cannot be read ({error})") from error


def _part(batch: pa.RecordBatch, columns: list[str]) -> _Part:
    lists = batch.column("gene_ids")
    codes = {name: batch.column(name).to_numpy(zero_copy_only=True) for name in (*columns, "source", "row")}
    return _Part(
        lists.offsets.to_numpy(zero_copy_only=True),
        lists.values.to_numpy(zero_copy_only=True),
        batch.column("counts").values.to_numpy(zero_copy_only=True),
        codes,
    )


def _damaged(path: Path, what: str) -> InputError:
    return input_error(f"the store {path} is damaged: {what}", "the files as they were written", "copy it again, or make it again")
