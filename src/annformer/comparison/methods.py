"""Methods that are compared, and running each once per seed with a watch on time and memory."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float

from annformer.comparison.cells import fresh
from annformer.comparison.kept import NOTHING_KEPT, Arrays, Kept, table_as_arrays, table_of_arrays
from annformer.durations import in_words
from annformer.errors import input_error
from annformer.tasks._stopwatch import timed

log = logging.getLogger(__name__)

Kind = Literal["ours", "floor", "control"]
SAMPLED_EVERY = 0.02
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Made:
    """What a method returns."""

    embedding: Float[np.ndarray, "cell width"]
    history: pd.DataFrame | None = None

    def arrays(self) -> Arrays:
        """All of it, to be kept."""
        return {"embedding": self.embedding, **table_as_arrays(self.history)}

    @classmethod
    def of_arrays(cls, arrays: Arrays) -> Self:
        """Take what `arrays` gave."""
        return cls(arrays["embedding"], table_of_arrays(arrays))


class Listed(Protocol):
    """What one must know of a method to choose it."""

    @property
    def name(self) -> str:
        """As on the page."""
        ...

    @property
    def kind(self) -> Kind:
        """Ours, or a floor."""
        ...

    @property
    def missing(self) -> str | None:
        """What to install, when it cannot run here."""
        ...


AnyMethod = TypeVar("AnyMethod", bound=Listed)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    name: str
    kind: Kind
    make: Callable[..., Made]
    """Cells and seed to embedding. The cells have counts and, in obs, the batch only: nothing can look at a label."""
    random: bool = True
    """Its result depends on the seed, so it is run with every seed."""
    missing: str | None = None
    """What to install, when it cannot run here."""
    fewest_cells: int = 1
    """Cells that it needs in every batch."""
    slow: bool = False
    """One run may take longer than all others together: said before the first."""
    resumes: bool = False
    """`make` takes a `folder` too, by which the same call goes on after a kill."""


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: Method
    seed: int
    made: Made
    seconds: float
    memory_mb: float


def choose(table: Mapping[str, AnyMethod], wanted: Sequence[str] | None) -> tuple[list[AnyMethod], dict[str, str]]:
    """Methods to run, and those that cannot run with the reason.

    Raises
    ------
    InputError
        When one that was asked for by name does not exist or cannot run here, or when nothing of ours or no floor is left.
    """
    if wanted is None:
        chosen = [method for method in table.values() if method.missing is None]
        return _enough(chosen, table), {name: method.missing for name, method in table.items() if method.missing is not None}
    spelt = {_plain(name): name for name in table}
    chosen = []
    for plain, name in {_plain(name): name for name in wanted}.items():
        if plain not in spelt:
            near = get_close_matches(plain, spelt, n=2, cutoff=0.5)
            found = f"there is no method {name!r}"
            remedy = f"did you mean {' or '.join(spelt[text] for text in near)}?" if near else "choose among them, or leave --methods out"
            raise input_error(found, f"some of {', '.join(table)}", remedy)
        method = table[spelt[plain]]
        if method.missing is not None:
            found = f"{method.name} cannot run here"
            raise input_error(found, method.missing, "install it, or leave the method out of --methods")
        chosen.append(method)
    return _enough(chosen, table), {}


def _plain(name: str) -> str:
    """Spell a name as people may: in any case, with dashes, ours with or without our name."""
    return " ".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split()).removeprefix("annformer ")


def _enough(chosen: list[AnyMethod], table: Mapping[str, AnyMethod]) -> list[AnyMethod]:
    for kind, what in (("ours", "method of annformer"), ("floor", "baseline")):
        if not any(method.kind == kind for method in chosen):
            names = [name for name, method in table.items() if method.kind == kind]
            found = f"there is no {what} among the methods {', '.join(method.name for method in chosen)}"
            raise input_error(found, f"at least one of {', '.join(names)}", "add one of them to --methods")
    return chosen


def run_all(methods: Iterable[Method], cells: AnnData, seeds: Sequence[int], kept: Kept = NOTHING_KEPT) -> list[Run]:
    """Run every method on the same cells, random ones with every seed.

    The floors come first: they are quick, so what is wrong with the cells shows early. Further seeds come after the first of all methods,
    when it can be said how long they will take. Runs are in the order of the methods.
    """
    rank = {"floor": 0, "ours": 1, "control": 2}
    ordered = sorted(methods, key=lambda m: rank[m.kind])
    first = [(method, seeds[0]) for method in ordered]
    jobs = first + [(method, seed) for seed in seeds[1:] for method in ordered if method.random]
    slow = ", ".join(m.name for m in ordered if m.slow)
    log.info("%d runs of %d methods%s", len(jobs), len(ordered), f"; by far the slowest: {slow}" if slow else "")
    runs = []
    for number, (method, seed) in enumerate(jobs, 1):
        log.info("[%d/%d] %s%s", number, len(jobs), method.name, f", seed {seed}" if method.random and len(seeds) > 1 else "")
        runs.append(_run(method, cells, seed, kept))
        log.info("took %s", in_words(runs[-1].seconds))
        if number == len(first) < len(jobs):
            rest = sum(run.seconds for run in runs if run.method.random) * (len(seeds) - 1)
            log.info("the other %d runs will take about %s", len(jobs) - number, in_words(rest))
    return sorted(runs, key=lambda run: ordered.index(run.method))


def _run(method: Method, cells: AnnData, seed: int, kept: Kept) -> Run:
    run = {"method": method.name, "seed": int(seed)}
    work = kept.work(**run) if method.resumes else None
    given = {"folder": work} if work else {}
    made, seconds, memory = kept.get(Made, lambda: watched(lambda: method.make(fresh(cells), seed, **given), work), **run)
    assert made.embedding.shape[0] == cells.n_obs, f"{method.name} returned other cells"
    return Run(method, seed, made, seconds, memory)


def watched(work: Callable[[], Found], folder: Path | None = None) -> tuple[Found, float, float]:
    """Do the work; return its result, its seconds, and the growth of memory in MB.

    Parameters
    ----------
    folder
        Of work that goes on where it was stopped: the seconds before are kept there, and counted.
    """
    with timed(folder) as seconds, threads_kept(), MemoryWatch() as memory:
        made = work()
        taken = seconds()
    return made, taken, memory.growth_mb


@dataclass
class MemoryWatch:
    """Growth of this process's resident memory while a block runs, at its peak, looked at every few hundredths of a second.

    Memory that stays with the process from earlier work and is used again is not counted.
    """

    growth_mb: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        import psutil

        gc.collect()
        process = psutil.Process()
        before = process.memory_info().rss

        def watch() -> None:
            while True:
                self.growth_mb = max(self.growth_mb, (process.memory_info().rss - before) / 2**20)
                if self._stop.wait(SAMPLED_EVERY):
                    return

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def threads_kept() -> Iterator[None]:
    """Scanpy and others set the number of threads for everybody: put it back."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def shuffled(runs: Sequence[Run], ours: str, seed: int) -> Run:
    """Return the control: the embedding of `ours` with its rows dealt to other cells."""

    def make(_cells: AnnData, seed: int) -> Made:
        rows = next(run.made.embedding for run in runs if run.method.name == ours)
        return Made(np.random.default_rng(seed).permutation(rows, axis=0))

    method = Method(CONTROL, "control", make, random=False)
    return Run(method, seed, make(AnnData(), seed), 0.0, 0.0)


CONTROL = "shuffled cells"


def log_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Losses of all runs that have some, by method and seed."""
    tables: list[Any] = []
    for run in runs:
        if run.made.history is not None:
            table = run.made.history.copy()
            table.insert(0, "method", run.method.name)
            table.insert(1, "seed", run.seed)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["method", "seed", "step"])


def first_of(runs: Sequence[Run]) -> dict[str, Float[np.ndarray, "cell width"]]:
    """Embedding of every method with the first seed."""
    found: dict[str, np.ndarray] = {}
    for run in runs:
        found.setdefault(run.method.name, run.made.embedding)
    return found
