"""write_store: data sets -> a shuffled store, in bounded memory, resumable, whole or not at all.

Every cell gets a key, a hash of its content and the seed. Cells are scattered by key into bucket files; then each bucket is sorted by
key in memory and appended to a shard. So the order of the store is random but depends on nothing but its cells and the seed, and cells
with the same content meet in the same bucket, where all but one are dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int

import annformer
from annformer.data.cell_keys import Held, HeldOut, cell_keys, shuffled
from annformer.data.measured import note_measured, write_measured
from annformer.data.store import FORMAT
from annformer.data.store_buckets import Buckets, Cells, facts_type
from annformer.data.store_manifest import HeldOutRecord, Shard, SourceRecord, StoreManifest
from annformer.data.store_partial import PartialStore, State
from annformer.data.store_plan import LABELS, Plan, make_plan, no_counts
from annformer.data.store_shards import ShardWriter
from annformer.data.studies import UNKNOWN, LabelCodes, Study, StudyCells
from annformer.durations import in_words
from annformer.errors import input_error
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab

logger = logging.getLogger(__name__)

CELLS_PER_READ: Final = 1024
SHARD_BYTES: Final = 2**30
SAY_TIME_AFTER: Final = 3.0
"""Seconds of work from which the time of the whole is told."""

Progress = Callable[[str, int, int], None]


def write_store(
    sources: Sequence[str | Path | Study],
    out: str | Path,
    *,
    exclude: Sequence[str | Path | Study] = (),
    vocab: GeneVocab | None = None,
    columns: Sequence[str] = LABELS,
    allow_normalised: bool = False,
    seed: int = 0,
    memory_gb: float = 1.0,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StoreManifest:
    """Write the cells of many data sets into one shuffled store.

    Cells without any gene of the vocabulary are left out, and so are all but the first of cells with the same counts. The order of the
    cells depends on their content and the seed only. Until it is whole, the work stands beside it in `<out>.partial`, from where a stopped
    run goes on with `resume=True` to the very same store.

    Parameters
    ----------
    sources
        Data sets, folders of data sets, tables of studies; see `find_studies`.
    out
        Folder to make.
    exclude
        Data sets whose cells must not get into the store, such as those of an evaluation: a cell is recognised by its counts of the genes
        that both files have, whatever its name.
    vocab
        Genes of the store; None: every approved gene that some data set has, in alphabetical order.
    columns
        Label columns to keep; where obs has no such column, `study` is the file's name and others are `unknown`.
    allow_normalised
        Also take data that are not counts; logarithms are undone.
    seed
        Of the order of the cells.
    memory_gb
        Memory for buckets, beside the 0.5 GB or so that reading takes.
    shard_bytes
        Size of a shard; larger where there would be more than `MAX_SHARDS`.
    progress
        Called with the phase ("reading", "writing"), the cells done in it and their total.

    Returns
    -------
    The manifest of the store.

    Raises
    ------
    InputError
        When a data set cannot be used, before anything is written where that can be seen from a sample of its values.
    """
    with _quiet():
        plan = make_plan(sources, exclude, vocab, columns, seed, memory_gb, shard_bytes, allow_normalised=allow_normalised)
    n_cells = sum(plan.n_cells)
    logger.info(
        "%s cells of %d studies, %s genes: at most %.2g GB on disk, about %.2g GB of memory",
        f"{n_cells:,}", len(plan.studies), f"{len(plan.vocab.genes):,}", plan.n_bytes / 1e9, 0.5 + memory_gb,
    )  # fmt: skip
    report = _timed(progress, n_cells)
    with PartialStore(Path(out), overwrite=overwrite) as partial:
        partial.require_room(plan.n_bytes)
        partial.begin(plan.job(), resume=resume)
        buckets = Buckets(partial.buckets, plan.n_buckets, len(plan.columns))
        if not partial.state.scattered:
            with _quiet():
                _scatter(plan, partial, buckets, report)
        shards = ShardWriter(plan.columns, len(plan.vocab), partial.store, partial.buckets)
        _write_shards(plan, partial, buckets, shards, report)
        manifest = _manifest(plan, partial, shards)
        partial.publish(manifest, plan.vocab)
    return manifest


def _scatter(plan: Plan, partial: PartialStore, buckets: Buckets, report: Progress) -> None:
    state = partial.state
    buckets.cut(state.sizes)
    codes = {column: LabelCodes(state.categories.get(column, ())) for column in plan.columns}
    held_out = HeldOut(plan.held_out, plan.vocab)

    def save() -> None:
        state.sizes = buckets.flush()
        state.categories = {column: labels.categories for column, labels in codes.items()}
        partial.save()

    for number in range(state.source, len(plan.studies)):
        reader = _Reader(plan, number, held_out, codes)
        state.studies[number:] = [reader.facts()]
        note_measured(partial.buckets, number, reader.source.match(plan.vocab).ids, len(plan.vocab))
        for cells in reader.cells(state.row, state.counters(number)):
            buckets.add(cells)
            state.row = reader.row
            report("reading", sum(plan.n_cells[:number]) + state.row, sum(plan.n_cells))
            if buckets.n_waiting > plan.bucket_bytes:
                save()
        state.source, state.row = number + 1, 0
    held_out.close()
    state.scattered = True
    save()


class _Reader:
    """Cells of one study as facts, genes and counts, without the empty and the excluded ones."""

    def __init__(self, plan: Plan, number: int, held_out: HeldOut, codes: dict[str, LabelCodes]) -> None:
        self.plan, self.number = plan, number
        name, self.study = list(plan.studies.items())[number]
        self.source: StudyCells = self.study.open()
        self.held: list[Held] = held_out.against(self.source.match(plan.vocab), name)
        self.codes = [
            codes[column].of_study(self.study, self.source, column, name if column == "study" else UNKNOWN) for column in plan.columns
        ]
        self.row = 0
        """Rows that are done."""

    def facts(self) -> dict[str, Any]:
        """Say how the study is read."""
        counts, report = self.source.counts, self.source.match(self.plan.vocab).report()
        genes = f"{report.n_genes:,} genes ({report.share:.0%} of the names are known)"
        logger.info("%s: %s cells, %s, %s from %s", self.study.path, f"{self.source.n_obs:,}", genes, counts.kind, counts.where)
        return {"counts_from": counts.where, "kind": counts.kind, "genes": report.to_dict()}

    def cells(self, start: int, counters: dict[str, int]) -> Iterator[Cells]:
        """Yield the cells from row `start` on; `counters` gets what is left out, by reason and held-out study."""
        for batch in self.source.batches(CELLS_PER_READ, vocab=self.plan.vocab, start=start):
            self._require_counts(batch)
            lengths = np.diff(batch.counts.indptr)
            wanted = lengths > 0
            _add(counters, "empty", ~wanted)
            excluded = np.zeros_like(wanted)
            for held in self.held:
                found = held.found(batch)
                _add(counters, f"in {held.name}", found)
                excluded |= found
            _add(counters, "excluded", excluded & wanted)
            self.row = int(batch.rows[-1]) + 1
            yield self._facts(batch, lengths).take(np.flatnonzero(wanted & ~excluded))
        self.source.close()

    def _facts(self, batch: CellBatch, lengths: Int[np.ndarray, "cell"]) -> Cells:
        batch = batch.in_counts()  # a store does not say of each cell what its values are
        facts = np.empty(len(lengths), dtype=facts_type(len(self.codes)))
        everywhere = np.zeros(len(self.plan.vocab), dtype=np.int8)
        facts["key"] = shuffled(cell_keys(batch, everywhere)[0][:, 0], self.plan.seed)
        facts["source"], facts["row"], facts["length"] = self.number, self.source.numbers(batch.rows), lengths
        for i, codes in enumerate(self.codes):
            facts[f"c{i}"] = codes[batch.rows]
        gene_ids = np.asarray(batch.gene_ids, dtype=np.int32)[batch.counts.indices]
        return Cells(facts, gene_ids, batch.counts.data.astype(np.float32, copy=False))

    def _require_counts(self, batch: CellBatch) -> None:
        data = batch.counts.data
        if not self.plan.allow_normalised and not (data == np.rint(data)).all():
            rows = f"{batch.rows[0]} to {batch.rows[-1]}"
            raise no_counts(self.study, f"{self.source.counts.where} was taken for counts, but cells {rows} hold fractions")


def _write_shards(plan: Plan, partial: PartialStore, buckets: Buckets, shards: ShardWriter, report: Progress) -> None:
    """Sort the buckets into shards, one after the other; those that an earlier run finished are left alone."""
    state = partial.state
    for number, part in enumerate(np.array_split(np.arange(plan.n_buckets), plan.n_shards)):
        if number == len(state.shards):
            shard, dropped = shards.write(number, (buckets.load(bucket) for bucket in part.tolist()))
            state.shards.append(shard.model_dump())
            for source, n in enumerate(np.bincount(dropped, minlength=len(plan.studies)).tolist()):
                _count(state.counters(source), "duplicates", n)
            partial.save()
        for bucket in part.tolist():
            buckets.remove(bucket)
        written = sum(shard["n_cells"] for shard in state.shards)
        report("writing", written, sum(plan.n_cells))


def _manifest(plan: Plan, partial: PartialStore, shards: ShardWriter) -> StoreManifest:
    state = partial.state
    written = [Shard.model_validate(shard) for shard in state.shards]
    n_cells = sum(shard.n_cells for shard in written)
    if n_cells == 0:
        found = "no cell is left: all are empty or excluded"
        raise input_error(found, "at least one cell", "give other data, or exclude less")
    n_genes = shards.write_genes(plan.vocab, len(written))
    sources = [_source_record(plan, state, number) for number in range(len(plan.studies))]
    held_out = [
        HeldOutRecord(
            name=name,
            n_found=sum(s.found_in.get(name, 0) for s in sources),
            **study.record(),
        )
        for name, study in plan.held_out.items()
    ]
    return StoreManifest(
        format=FORMAT,
        version=annformer.__version__,
        seed=plan.seed,
        n_cells=n_cells,
        n_values=sum(shard.n_values for shard in written),
        n_genes=n_genes,
        columns=state.categories,
        shards=[shard for shard in written if shard.n_cells],
        sources=sources,
        held_out=held_out,
        measured=write_measured(partial.store, partial.buckets, len(plan.studies)),
    )


def _source_record(plan: Plan, state: State, number: int) -> SourceRecord:
    name, study = list(plan.studies.items())[number]
    counters, n_cells = state.counters(number), plan.n_cells[number]
    n_empty, n_duplicates, n_excluded = (counters.get(reason, 0) for reason in ("empty", "duplicates", "excluded"))
    return SourceRecord(
        name=name,
        n_cells=n_cells,
        n_kept=n_cells - n_empty - n_duplicates - n_excluded,
        n_empty=n_empty,
        n_duplicates=n_duplicates,
        n_excluded=n_excluded,
        found_in={reason[3:]: n for reason, n in counters.items() if reason.startswith("in ")},
        **study.record(),
        **state.studies[number],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what single files have to say: one line of ours for each is enough, and the manifest has the rest."""
    loggers = [logging.getLogger(f"annformer.data.{name}") for name in ("anndata", "counts")]
    for one in loggers:
        one.addFilter(_above_info)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(_above_info)


def _above_info(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO


def _timed(progress: Progress | None, n_cells: int) -> Progress:
    """Report progress, and say once how long the whole will take."""
    began, said = time.monotonic(), False

    def report(phase: str, done: int, total: int) -> None:
        nonlocal said
        seconds = time.monotonic() - began
        if not said and seconds > SAY_TIME_AFTER:
            said = True
            rest = 1.5 * seconds * (n_cells - done) / max(done, 1)  # writing the shards takes about half as long as reading
            logger.info("about %s left", in_words(rest))
        if progress is not None:
            progress(phase, done, total)

    return report


def _add(counters: dict[str, int], reason: str, which: Bool[np.ndarray, "cell"]) -> None:
    _count(counters, reason, int(which.sum()))


def _count(counters: dict[str, int], reason: str, n: int) -> None:
    if n:
        counters[reason] = counters.get(reason, 0) + n
