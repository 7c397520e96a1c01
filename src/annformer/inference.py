"""Source -> tokens -> cell states, over any number of cells in bounded memory: the loop that every task on finished models shares.

A reader thread fetches and tokenizes the next cells while the network works on the present ones. Cells are read in runs of `size`, sorted
by length inside the run, cut into forwards by a token budget, and handed back in the order of the source. Which cells share a forward
changes nothing but the last float32 digit, because cells never see each other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from annformer.data.source import CellSource
from annformer.durations import in_words
from annformer.scgpt import ScGPT
from annformer.tokenizer import TokenizerSettings, n_kept
from annformer.tokens import CellBatch, TokenBatch

CELLS_PER_READ = 512
"""Cells read, tokenized and handed back together; runs of 512 read from disk at near sequential speed and cost a few MB."""
TOKENS_PER_FORWARD = {"cpu": 4_096, "cuda": 262_144}
"""Token budget of one forward by device type. On a CPU small ones stay in the cache (10 % faster than 32,768 at 128 wide); a
GPU needs large ones to be busy."""

_LONG_ENOUGH = 0.3
"""Seconds of work that tell how fast it goes; less is mostly what every call costs."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class _Evaluated:
    """How many use a model in evaluation mode just now, and the modes to give back."""

    n_users: int
    modes: dict[str, bool]


_evaluated: WeakKeyDictionary[torch.nn.Module, _Evaluated] = WeakKeyDictionary()
_evaluated_lock = Lock()


class _Prepared(NamedTuple):
    rows: Int[np.ndarray, "cell"]
    order: Int[np.ndarray, "cell"]
    """Position in `rows` of each tokenized cell; the cells are sorted by length."""
    tokens: TokenBatch


def encode_cells(
    model: ScGPT,
    source: CellSource,
    *,
    settings: TokenizerSettings | None = None,
    start: int = 0,
    size: int | None = None,
    max_tokens: int | None = None,
    workers: int = 1,
    labels: Mapping[str, Int[np.ndarray, "cell"]] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[Int[np.ndarray, "cell"], Float[np.ndarray, "cell width"]]]:
    """Cell states of all cells of `source`, run by run, in the order of the source.

    Parameters
    ----------
    model
        The network runs where its weights are; it works in evaluation mode and gets its own mode back at the end.
    settings
        How cells become tokens; the model's own by default.
    start
        First row, to go on with work done before.
    size
        Cells per run; by default `CELLS_PER_READ`.
    max_tokens
        Tokens per forward; by default `TOKENS_PER_FORWARD` of the device. A cell longer than that still goes through, alone.
    workers
        Threads that read and tokenize ahead; 0 does it in turn.
    labels
        Codes of every cell of `source` by role, for a network that reads more than genes and values.
    advance
        Called with the number of cells after every forward, for a progress bar.

    Yields
    ------
    Rows of the source and their float32 states, not normalised. Cells without any expressed gene of the vocabulary are NaN.
    """
    settings = settings or model.tokenizer
    _require_measured(source, settings)
    batches = iter(source.batches(size or CELLS_PER_READ, vocab=model.vocab, start=start))
    with evaluating(model):
        for prepared in read_ahead(batches, lambda cells: _prepare(cells, model, settings, labels), workers):
            yield prepared.rows, _encode(model, prepared, max_tokens, advance)


def _require_measured(source: CellSource, settings: TokenizerSettings) -> None:
    """Refuse a store of which the zeros that the settings ask for would be false."""
    if settings.zeros != 0:
        from annformer.data.store import StoreSource

        if isinstance(source, StoreSource):
            source.require_measured()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; when the last of those who use the model at once is done, every submodule has the mode it had."""
    with _evaluated_lock:
        if model not in _evaluated:
            _evaluated[model] = _Evaluated(0, {name: module.training for name, module in model.named_modules()})
            model.eval()
        _evaluated[model].n_users += 1
    try:
        yield
    finally:
        with _evaluated_lock:
            _evaluated[model].n_users -= 1
            if _evaluated[model].n_users == 0:
                modes = _evaluated.pop(model).modes
                for name, module in model.named_modules():
                    module.training = modes[name]


def read_ahead(items: Iterator[T], work: Callable[[T], R], workers: int) -> Iterator[R]:
    """`map(work, items)` with `workers` threads that run ahead by at most `workers` + 1 results; the order is kept.

    `items` is only ever advanced by one thread at a time; `work` runs in parallel.
    """
    if workers == 0:
        yield from map(work, items)
        return
    lock, numbered = Lock(), enumerate(items)

    def job() -> tuple[int, R | None]:
        with lock:
            number, item = next(numbered, (-1, None))
        return number, None if item is None else work(item)

    done: dict[int, R | None] = {}
    wanted = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="annformer-read") as pool:
        pending: deque[Future[tuple[int, R | None]]] = deque(pool.submit(job) for _ in range(workers + 1))
        try:
            while pending:
                number, result = pending.popleft().result()
                if number >= 0:
                    done[number] = result
                    pending.append(pool.submit(job))
                while wanted in done:
                    yield done.pop(wanted)  # type: ignore[misc]  # None stands only beside the number -1
                    wanted += 1
        finally:
            for future in pending:
                future.cancel()


def _prepare(
    cells: CellBatch, model: ScGPT, settings: TokenizerSettings, labels: Mapping[str, Int[np.ndarray, "cell"]] | None = None
) -> _Prepared:
    if labels is not None:
        cells = cells._replace(labels={role: codes[cells.rows] for role, codes in labels.items()})
    order = np.argsort(_n_read(cells, model), kind="stable")
    return _Prepared(cells.rows, order, model.tokenize(cells.take(order), settings))


def _n_read(cells: CellBatch, model: ScGPT) -> Int[np.ndarray, "cell"]:
    """Expressed genes that the model reads, of every cell."""
    return np.diff((cells if model.panel is None else cells.over(model.panel)).counts.indptr)


def _encode(
    model: ScGPT, prepared: _Prepared, max_tokens: int | None, advance: Callable[[int], None] | None
) -> Float[np.ndarray, "cell width"]:
    device = next(model.parameters()).device
    budget = max_tokens or TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD["cpu"])
    offsets = prepared.tokens.offsets.numpy()
    n_empty = int((np.diff(offsets) == 1).sum())  # sorted by length: they come first
    states = np.full((len(offsets) - 1, model.config.model.width), np.nan, dtype=np.float32)
    at_a_time = torch.get_num_threads() if device.type == "cpu" else 1
    cuts = list(_cuts(offsets, n_empty, min(budget, -(-prepared.tokens.n_tokens // at_a_time))))

    def forward(cut: tuple[int, int]) -> Float[np.ndarray, "cell width"]:
        return _forward(model, _part(prepared.tokens, *cut).to(device))

    for (first, last), found in zip(cuts, _side_by_side(forward, cuts, at_a_time), strict=True):
        states[prepared.order[first:last]] = found
        if advance is not None:
            advance(last - first)
    if advance is not None and n_empty:
        advance(n_empty)
    return states


def _side_by_side(work: Callable[[T], R], items: Sequence[T], n_threads: int) -> Iterator[R]:
    """`map(work, items)` on `n_threads` threads, of which each lets torch use one.

    Threads inside every product wait for each other thousands of times a second: where other work shares the machine, that is several
    times slower than forwards that never wait.
    """
    if n_threads == 1 or len(items) < 2:
        yield from map(work, items)
        return
    try:
        with ThreadPoolExecutor(n_threads, "annformer-forward", torch.set_num_threads, (1,)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(n_threads)  # the number is partly global


def _forward(model: ScGPT, tokens: TokenBatch) -> Float[np.ndarray, "cell width"]:
    with torch.inference_mode():
        cell: Tensor = model.encode(tokens, wanted="cell").cell
        return cell.float().cpu().numpy()


def _cuts(offsets: Int[np.ndarray, "cell+1"], first: int, budget: int) -> Iterator[tuple[int, int]]:
    n_cells = len(offsets) - 1
    while first < n_cells:
        last = int(np.searchsorted(offsets, offsets[first] + budget, side="right")) - 1
        last = min(max(last, first + 1), n_cells)
        yield first, last
        first = last


def _part(tokens: TokenBatch, first: int, last: int) -> TokenBatch:
    """Cells `first` to `last`; tensors are views."""
    begin, end = int(tokens.offsets[first]), int(tokens.offsets[last])
    per_token = ("gene_ids", "values", "flags", "dose", "targets", "modality")
    cut: dict[str, Any] = {name: value[begin:end] for name in per_token if (value := getattr(tokens, name)) is not None}
    labels = {name: label[first:last] for name, label in tokens.labels.items()}
    if tokens.expression is not None:
        cut["expression"] = tokens.expression[first:last]
    if tokens.profile is not None:
        cut["profile"] = tokens.profile.part(first, last)
    return tokens._replace(**cut, offsets=tokens.offsets[first : last + 1] - begin, n_visible=tokens.n_visible[first:last], labels=labels)


@dataclass(frozen=True)
class Estimate:
    """What encoding all cells of a source will take, from a few of its cells."""

    n_cells: int
    mean_tokens: float
    seconds: float
    memory_bytes: int
    hints: tuple[str, ...]
    """What would make it shorter; empty below one minute."""

    def lines(self) -> list[str]:
        """For people."""
        rate = self.n_cells / max(self.seconds, 1e-9)
        head = (
            f"{self.n_cells:,} cells with {self.mean_tokens:,.0f} tokens on average: about {in_words(self.seconds)}"
            f" ({rate:,.{0 if rate >= 10 else 1}f} cells/s) and {self.memory_bytes / 1e9:.1f} GB of memory"
        )
        return [head, *([f"shorter with {'; '.join(self.hints)}"] if self.hints else [])]


def estimate(
    model: ScGPT,
    source: CellSource,
    *,
    settings: TokenizerSettings | None = None,
    start: int = 0,
    max_tokens: int | None = None,
    n_timed: int = 16,
) -> Estimate:
    """Time `n_timed` cells that stand for all lengths met at a few places of `source` and say what the whole will take.

    Parameters
    ----------
    start
        Rows before it are done already.
    n_timed
        Cells to time: a few seconds' work for the largest published model on one core. More of them where they take no time.
    """
    settings = settings or model.tokenizer
    _require_measured(source, settings)
    n_cells = source.n_obs - start
    part = CELLS_PER_READ // 4
    places = np.linspace(start, max(start, source.n_obs - part), 4).astype(np.int64)
    rows = np.unique(places[:, None] + np.arange(min(part, n_cells)))

    def read(rows: Int[np.ndarray, "cell"]) -> CellBatch:
        return next(iter(source.batches(len(rows), vocab=model.vocab, rows=rows)))

    _prepare(read(rows[:2]), model, settings)  # the first time opens the file and loads what is compiled
    began = time.perf_counter()
    cells = read(rows)
    _prepare(cells, model, settings)
    preparing = (time.perf_counter() - began) / len(rows)
    encoding = _seconds_per_cell(model, cells, settings, max_tokens, n_timed)
    on_cpu = next(model.parameters()).device.type == "cpu"  # there, reading ahead and the network share the cores
    seconds = n_cells * (preparing + encoding if on_cpu else max(preparing, encoding))
    chosen = cells if model.panel is None else cells.over(model.panel)
    n_expressed, n_zeros = n_kept(np.diff(chosen.counts.indptr), chosen.n_measured, settings)
    lengths = 1 + n_expressed + n_zeros
    return Estimate(n_cells, float(lengths.mean()), seconds, _memory(model, n_cells, max_tokens), _hints(model, lengths, seconds))


def _spread(cells: CellBatch, wanted: int) -> CellBatch:
    """`wanted` cells at evenly spaced ranks of length."""
    n_genes = np.diff(cells.counts.indptr)
    ranks = ((np.arange(min(wanted, len(n_genes))) + 0.5) * len(n_genes) / min(wanted, len(n_genes))).astype(int)
    picked = np.argsort(n_genes, kind="stable")[ranks]
    return cells.take(picked)


def _seconds_per_cell(model: ScGPT, cells: CellBatch, settings: TokenizerSettings, max_tokens: int | None, n_timed: int) -> float:
    """What the network takes for a cell among many, in forwards side by side as in the whole run."""
    with evaluating(model):
        _encode(model, _prepare(_spread(cells, 2), model, settings), max_tokens, None)  # the first call fills caches
        while True:
            chosen = _prepare(_spread(cells, n_timed), model, settings)
            began = time.perf_counter()
            _encode(model, chosen, max_tokens, None)
            seconds = time.perf_counter() - began
            if seconds > _LONG_ENOUGH or len(chosen.rows) == len(cells.rows):
                return seconds / len(chosen.rows)
            n_timed *= 4


def _memory(model: ScGPT, n_cells: int, max_tokens: int | None) -> int:
    """Of this process now, one layer's activations of the full forwards at a time, and the result."""
    config = model.config.model
    device = next(model.parameters()).device.type
    tokens = max_tokens or TOKENS_PER_FORWARD.get(device, TOKENS_PER_FORWARD["cpu"])
    activations = 4 * tokens * (8 * config.width + config.ff_width) * torch.get_num_threads() if device == "cpu" else 0
    return int(psutil.Process().memory_info().rss) + activations + 4 * n_cells * config.width


def _hints(model: ScGPT, lengths: Int[np.ndarray, "cell"], seconds: float) -> tuple[str, ...]:
    if seconds < 60:
        return ()
    half = int(lengths.max()) // 2
    share = np.minimum(lengths, half).sum() / lengths.sum()
    hints = [f"max_length {half} (fewer genes of the long cells): about {in_words(seconds * share)}"]
    if next(model.parameters()).device.type == "cpu":
        hints.append("device cuda" if torch.cuda.is_available() else "a GPU (device cuda)")
    config = model.config.model
    hints.append(f"a smaller model (this one is {config.n_layers} layers deep and {config.width} wide)")
    return tuple(hints)
