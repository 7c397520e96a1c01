"""The manifest of a store: what it holds and how it came about."""

from __future__ import annotations

from typing import Any, Literal

from annformer.config import Config


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
    obs_filter: str | None = None
    """Of a SOMA experiment: which of its cells were asked for."""
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
    obs_filter: str | None = None
    """Of a SOMA experiment: which of its cells were asked for."""
    n_found: int
    """Cells of the sources that were recognised as cells of this data set."""


class FileRecord(Config):
    """A file beside the shards."""

    file: str
    n_bytes: int
    sha256: str


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
    measured: FileRecord | None = None
    """Which genes each source measured; None: the store was made before this was written down."""
    vocab: FileRecord | None = None
    """Gene -> id; None: the store was made before its hash was written down."""
