"""Methods that call types, and running each on every fold: what it learns from and what it calls are parted before it sees either."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float, Shaped

from annformer.comparison.cells import fresh
from annformer.comparison.kept import NOTHING_KEPT, Arrays, Kept
from annformer.comparison.methods import Kind, watched
from annformer.data.split import Fold
from annformer.durations import in_words
from annformer.errors import AnnformerWarning

log = logging.getLogger(__name__)

TYPE, BATCH = "cell_type", "batch"
"""Columns of obs of what a method learns from; what it calls has none."""
CONTROL = "shuffled calls"


@dataclass(frozen=True)
class Called:
    """What a method says of cells; where it does not say something, None."""

    types: Shaped[np.ndarray, "cell"]
    confidence: Float[np.ndarray, "cell"] | None = None
    """Of the type that is called."""
    novelty: Float[np.ndarray, "cell"] | None = None
    sets: pd.DataFrame | None = None
    """Which types (columns) cannot be excluded, at a coverage of 0.9; a set may be empty."""
    parts: Mapping[str, Shaped[np.ndarray, "cell"]] = field(default_factory=dict)
    """Name of a method that is a part of this one -> the types that it calls alone."""

    def arrays(self) -> Arrays:
        """All of it, to be kept."""
        given = {"confidence": self.confidence, "novelty": self.novelty}
        found = {"types": self.types.astype(str)} | {name: values for name, values in given.items() if values is not None}
        if self.sets is not None:
            found |= {"sets": self.sets.to_numpy(), "set_types": np.array(self.sets.columns, dtype=str)}
            found["set_cells"] = np.array(self.sets.index, dtype=str)
        return found | {f"part {name}": types.astype(str) for name, types in self.parts.items()}

    @classmethod
    def of_arrays(cls, arrays: Arrays) -> Self:
        """Take what `arrays` gave."""
        parts = {name.removeprefix("part "): types.astype(object) for name, types in arrays.items() if name.startswith("part ")}
        sets = pd.DataFrame(arrays["sets"], arrays["set_cells"], arrays["set_types"]) if "sets" in arrays else None
        return cls(arrays["types"].astype(object), arrays.get("confidence"), arrays.get("novelty"), sets, parts)


@dataclass(frozen=True)
class Caller:
    """A row of the table of methods."""

    name: str
    kind: Kind
    call: Callable[[AnnData, AnnData, int], Called]
    """Reference with types (and, where whole batches are held out, batches) in obs, query with nothing in obs, and a seed."""
    random: bool = False
    """Its result depends on the seed, so it is run with every seed."""
    missing: str | None = None
    """What to install, when it cannot run here."""
    only_by_name: str | None = None
    """Why it runs only when it is asked for by name."""
    embedded: bool = False
    """It uses the embedding that is made once for all folds."""


@dataclass(frozen=True)
class Split:
    """One way to hold cells out."""

    name: str
    folds: Sequence[Fold]
    seeds: Sequence[int]
    batches: Shaped[np.ndarray, "cell"] | None = None
    """What is held out as a whole."""

    def jobs(self, callers: Sequence[Caller]) -> list[tuple[Caller, int]]:
        """Runs in one fold; the floors come first: they are quick, so what is wrong with the cells shows early."""
        ordered = sorted(callers, key=lambda caller: caller.kind == "ours")
        return [(caller, seed) for caller in ordered for seed in (self.seeds if caller.random else self.seeds[:1])]


@dataclass(frozen=True)
class CallRun:
    """One method with one seed on all folds of a split: every cell is called by what was learned from others."""

    name: str
    kind: Kind
    split: str
    seed: int
    called: Called
    seconds: float
    """Mean of a fold; NaN for what was not run by itself."""
    memory_mb: float
    """Most of a fold."""


def run_folds(
    callers: Sequence[Caller],
    cells: AnnData,
    labels: Shaped[np.ndarray, "cell"],
    splits: Sequence[Split],
    kept: Kept = NOTHING_KEPT,
) -> list[CallRun]:
    """Run every method on every fold of every split, random ones with all seeds of the split."""
    clock = _Clock([(caller.name, len(fold.train)) for split in splits for fold in split.folds for caller, _ in split.jobs(callers)])
    return [run for split in splits for run in _run_split(callers, cells, labels, split, clock, kept)]


def _run_split(
    callers: Sequence[Caller], cells: AnnData, labels: Shaped[np.ndarray, "cell"], split: Split, clock: _Clock, kept: Kept
) -> list[CallRun]:
    jobs = split.jobs(callers)
    found: dict[tuple[str, int], list[tuple[Called, float, float]]] = {}
    for fold in split.folds:
        log.info("%s held out (%s, %s cells)", fold.name, split.name, f"{len(fold.test):,}")
        given = Given(*parted(cells, fold, labels, split.batches), fold, split.batches is not None)
        for caller, seed in jobs:
            one = given.run(caller, seed, kept)
            found.setdefault((caller.name, seed), []).append(one)
            clock.tell(caller, seed if caller.random and len(split.seeds) > 1 else None, one[1])
        clock.estimate()
    runs = []
    for caller, seed in jobs:
        called, seconds, memory = zip(*found[caller.name, seed], strict=True)
        pooled = pool([fold.test for fold in split.folds], called)
        runs.append(CallRun(caller.name, caller.kind, split.name, seed, pooled, float(np.mean(seconds)), max(memory)))
    return runs


def parted(
    cells: AnnData, fold: Fold, labels: Shaped[np.ndarray, "cell"], batches: Shaped[np.ndarray, "cell"] | None
) -> tuple[AnnData, AnnData]:
    """What a method learns from, with types; and what it calls, with nothing but counts (and the embedding, which knows no type)."""

    def some(rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> AnnData:
        obs = pd.DataFrame({name: pd.Categorical(values[rows]) for name, values in columns.items()}, index=cells.obs_names[rows])
        embeddings = {name: np.asarray(values)[rows] for name, values in cells.obsm.items()}
        return AnnData(cells.X[rows], obs=obs, var=cells.var.copy(), obsm=embeddings, uns=copy.deepcopy(dict(cells.uns)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        reference = some(fold.train, {TYPE: labels} | ({} if batches is None else {BATCH: batches}))
        return reference, some(fold.test, {})


@dataclass(frozen=True)
class Given:
    """What a method gets in one fold."""

    reference: AnnData
    query: AnnData
    fold: Fold
    batches_known: bool

    def run(self, caller: Caller, seed: int, kept: Kept) -> tuple[Called, float, float]:
        """What it says, its seconds, and the growth of memory in MB."""

        def call() -> tuple[Called, float, float]:
            learned_from, asked = fresh(self.reference), fresh(self.query)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AnnformerWarning)  # of rare types, in every fold again: the page counts the cells of each
                return watched(lambda: caller.call(learned_from, asked, seed))

        rows = hashlib.sha256(self.fold.train.astype(np.int64).tobytes() + b"|" + self.fold.test.astype(np.int64).tobytes()).hexdigest()
        found = kept.get(Called, call, method=caller.name, seed=int(seed), cells_of_fold=rows, batches_known=self.batches_known)
        assert len(found[0].types) == self.query.n_obs, f"{caller.name} called other cells"
        return found


def pool(rows: Sequence[np.ndarray], called: Sequence[Called]) -> Called:
    """Put what was said of the parts into the order of all cells; every cell stands in one part."""
    order = np.argsort(np.concatenate(rows))

    def joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        some = [array for array in arrays if array is not None]
        return np.concatenate(some)[order] if len(some) == len(called) else None

    types = joined([one.types for one in called])
    assert types is not None, "every method calls types"
    sets = [one.sets for one in called if one.sets is not None]
    whole = pd.concat([table.astype(float) for table in sets]).fillna(0).iloc[order] > 0 if len(sets) == len(called) else None
    shared = [name for name in called[0].parts if all(name in one.parts for one in called)]
    parts = {name: np.concatenate([one.parts[name] for one in called])[order] for name in shared}
    return Called(types, joined([one.confidence for one in called]), joined([one.novelty for one in called]), whole, parts)


def with_parts(runs: Sequence[CallRun]) -> list[CallRun]:
    """The runs, and as runs of their own the parts that some methods consist of: they cost nothing more."""
    return [
        each
        for run in runs
        for each in (
            run,
            *(replace(run, name=name, called=Called(types), seconds=np.nan, memory_mb=np.nan) for name, types in run.called.parts.items()),
        )
    ]


def shuffled(runs: Sequence[CallRun], ours: str, split: str, seed: int) -> CallRun:
    """Return the control: the types that `ours` calls, dealt to other cells."""
    run = next(run for run in runs if run.name == ours and run.split == split)
    dealt = np.random.default_rng(seed).permutation(run.called.types)
    return CallRun(CONTROL, "control", split, run.seed, Called(dealt), np.nan, np.nan)


class _Clock:
    """Says what each run took, and after each fold what the others will take."""

    def __init__(self, jobs: Sequence[tuple[str, int]]) -> None:
        self.jobs = jobs
        """Method and number of cells that it learns from."""
        self.took: list[float] = []
        log.info("%d runs of %d methods; how long all will take is said after the first fold", len(jobs), len({name for name, _ in jobs}))

    def tell(self, caller: Caller, seed: int | None, seconds: float) -> None:
        self.took.append(seconds)
        named = caller.name if seed is None else f"{caller.name}, seed {seed}"
        log.info("[%d/%d] %s took %s", len(self.took), len(self.jobs), named, in_words(seconds))

    def estimate(self) -> None:
        """As long for every cell that is learned from as the method took so far."""
        done, ahead = self.jobs[: len(self.took)], self.jobs[len(self.took) :]
        cells: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for (name, n), took in zip(done, self.took, strict=True):
            cells[name] = cells.get(name, 0) + n
            seconds[name] = seconds.get(name, 0.0) + took
        if ahead:
            rest = sum(seconds[name] / cells[name] * n for name, n in ahead)
            log.info("the other %d runs will take about %s", len(ahead), in_words(rest))
