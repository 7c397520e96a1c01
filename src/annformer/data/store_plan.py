"""What a store will be made of: everything that is found out, and refused, before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import annformer
from annformer.data.cell_keys import HeldOut
from annformer.data.find_studies import find_studies, study_names
from annformer.data.store import OWN_COLUMNS
from annformer.data.studies import Study
from annformer.data.tables import unknown_name
from annformer.errors import InputError, input_error
from annformer.genes import table_vocab
from annformer.vocab import GeneVocab

MAX_SHARDS: Final = 256
"""Shards are larger rather than more: every process that reads a store keeps each of them open."""

MOST_BYTES: Final = 2**33
"""Of a bucket: some 2^30 values, which are numbered by 32 bits. More memory than four times this is not used."""

LABELS: Final = ("study", "tissue", "assay", "cell_type", "batch")
"""Label columns of a store unless others are named; cells without them are of unknown ones."""


class Plan(NamedTuple):
    """What is found out before anything is written."""

    studies: dict[str, Study]
    """By name."""
    held_out: dict[str, Study]
    vocab: GeneVocab
    columns: tuple[str, ...]
    seed: int
    allow_normalised: bool
    bucket_bytes: int
    n_cells: list[int]
    """Of every study."""
    n_bytes: int
    """Of the store, if no cell is dropped."""
    n_buckets: int
    n_shards: int

    def job(self) -> dict[str, Any]:
        """Everything that the store depends on, as plain values."""
        return {
            "version": annformer.__version__,
            "studies": [study.identity() for study in self.studies.values()],
            "excluded": [study.identity() for study in self.held_out.values()],
            "vocabulary": hashlib.sha256("\n".join(self.vocab.tokens).encode()).hexdigest(),
            "columns": list(self.columns),
            "seed": self.seed,
            "allow_normalised": self.allow_normalised,
            "buckets": self.n_buckets,
            "shards": self.n_shards,
        }


def make_plan(
    sources: Sequence[str | Path | Study],
    exclude: Sequence[str | Path | Study],
    vocab: GeneVocab | None,
    columns: Sequence[str],
    seed: int,
    memory_gb: float,
    shard_bytes: int,
    *,
    allow_normalised: bool,
) -> Plan:
    """Look at all data sets; the parameters are those of `write_store`."""
    _check_options(columns, memory_gb, seed)
    studies, held = (dict(zip(study_names(found), found, strict=True)) for found in map(find_studies, (sources, exclude)))
    known, n_cells, n_values, genes = vocab or table_vocab(), [], 0, set()
    labels: set[str] = set()
    for study in studies.values():
        cells = study.open()
        if cells.counts.kind != "counts" and not allow_normalised:
            raise no_counts(study, f"{cells.counts.where} is {cells.counts.kind}: {cells.counts.note}")
        genes.update(cells.match(known).ids.tolist())
        labels.update(map(str, cells.obs.columns), study.labels)
        n_cells.append(cells.n_obs)
        n_values += cells.n_values
        cells.close()
    for name in columns:
        if name not in labels and name not in LABELS:
            found = f"no input has a label column {name!r}"
            raise unknown_name(found, name, sorted(labels), "columns of obs, or of the table of studies", "columns")
    if vocab is None:
        vocab = GeneVocab(sorted(known.tokens[i] for i in genes - {-1})).with_specials()
    HeldOut(held, vocab).close()  # opened now, so that a file that cannot be used is met before the work
    columns = tuple(dict.fromkeys(("study", *columns)))
    n_bytes = 8 * n_values + sum(n_cells) * (16 + 4 * len(columns))
    most = min(int(memory_gb * 1e9 / 4), MOST_BYTES)
    bucket_bytes = max(1, most)  # a bucket and its sorted copy, or as many cells that wait to be written, and some air
    n_buckets = -(-n_bytes // bucket_bytes)
    n_shards = min(n_buckets, MAX_SHARDS, -(-n_bytes // shard_bytes))
    return Plan(
        studies, held, vocab, columns, seed, allow_normalised, bucket_bytes, n_cells, n_bytes, n_buckets, n_shards,
    )  # fmt: skip


def _check_options(columns: Sequence[str], memory_gb: float, seed: int) -> None:
    if not 0 <= seed < 2**63:
        found = f"seed is {seed}"
        raise input_error(found, "a whole number from 0 on", "choose another seed (--seed)")
    reserved = [name for name in columns if name in OWN_COLUMNS]
    if reserved:
        found = f"a label column is called {reserved[0]!r}"
        raise input_error(found, f"other names than {', '.join(OWN_COLUMNS)}", "rename the column")
    if not memory_gb > 0:
        found = f"memory_gb is {memory_gb:g}"
        raise input_error(found, "more than 0", "give the memory for buckets in GB, for example 1")


def no_counts(study: Study, what: str) -> InputError:
    """Make the error for a study without raw counts."""
    remedy = "name the layer that holds the counts in a table of studies, leave the data set out, or allow it (--allow_normalised)"
    return input_error(f"{study.path} holds no raw counts: {what}", "whole numbers, so that all studies of a store mean the same", remedy)
