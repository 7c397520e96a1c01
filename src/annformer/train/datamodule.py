"""Cells -> batches of asked genes; which cells stand in which step, and what is asked, is a pure function of the seed."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.utils.data import DataLoader, Dataset, Sampler

from annformer.data.random_cells import MemoryCells, RandomCells, random_cells
from annformer.data.source import CellSource
from annformer.data.store import StoreSource
from annformer.data.tables import unknown_name
from annformer.errors import input_error
from annformer.masking import ask, hide_values
from annformer.tokenizer import TokenizerSettings, n_kept, tokenize
from annformer.tokens import TokenBatch
from annformer.train.batches import BatchPlan, deal, group_weights
from annformer.train.config import Balance, HoldOut, TrainConfig
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

_SPLIT, _SAMPLE = 2**31, 2**31 + 1
"""Beside the seed, what tells draws apart; the plan uses (seed, epoch)."""
ROW = "row"
"""Role under which batches carry the row of each cell in the source."""
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True)
class Reader:
    """From row numbers to batches; all that a loading process needs."""

    cells: RandomCells
    settings: TokenizerSettings
    config: TrainConfig
    cls_id: int
    label_keys: Mapping[str, str] | None
    panel: Int[np.ndarray, "panel"] | None = None
    view: bool = False
    profile: bool = False

    def tokens(self, rows: Int[np.ndarray, "cell"]) -> TokenBatch:
        """Read and tokenize cells as the finished model will; all their genes are visible."""
        return self._tokens(rows, self.settings)

    def asked(self, rows: Int[np.ndarray, "cell"], step: int) -> TokenBatch:
        """Batch of a training step: one of the shares is asked, the same for all cells of the step."""
        shares, seed = self.config.asked_shares, self.config.seed
        settings = training_settings(self.settings, self.config)
        tokens = self._tokens(rows, settings, step)
        if self.config.mode == "none":
            return tokens
        if self.config.mode == "ask":
            return ask(tokens, shares, seed=seed, step=step)
        share = shares[np.random.default_rng([seed, step]).integers(len(shares))]
        return hide_values(tokens, share, seed=seed, step=step)

    def asked_once(self, rows: Int[np.ndarray, "cell"], share: float) -> TokenBatch:
        """Batch of a validation: the same questions whenever it is made."""
        tokens, seed = self.tokens(rows), self.config.seed
        if self.config.mode == "none":
            return tokens
        return ask(tokens, [share], seed=seed) if self.config.mode == "ask" else hide_values(tokens, share, seed=seed)

    def _tokens(self, rows: Int[np.ndarray, "cell"], settings: TokenizerSettings, step: int = 0) -> TokenBatch:
        cells = self.cells.rows(rows, self.label_keys)
        tokens = tokenize(cells, settings, cls_id=self.cls_id, step=step, panel=self.panel, view=self.view, profile=self.profile)
        return tokens._replace(labels=tokens.labels | {ROW: torch.from_numpy(np.asarray(rows, np.int64))})

    def turns(self, item: _Item, rank: int, world: int) -> list[TokenBatch]:
        """What one of `world` ranks does in a step, a batch per turn."""
        n_turns = turns_of(self.config, world)
        parts = deal(item.lengths, world * n_turns)
        return [self.asked(item.rows[parts[turn * world + rank]], item.step) for turn in range(n_turns)]


@dataclass(frozen=True)
class _Item:
    """A step, as the training process hands it to the loading ones, which so need no plan."""

    step: int
    rows: Int[np.ndarray, "cell"]
    lengths: Int[np.ndarray, "cell"]


class CellDataModule(L.LightningDataModule):
    """Training and validation batches.

    Step `i` of training always has the same cells with the same questions, whatever the number of ranks, turns and loading processes:
    the plan tells the rows, and ties, choice of genes and questions are hashes of a cell's content, the seed and the step. So a run is
    resumed by the number of its next step alone. Validation asks each share once of the same held-out cells, always the same questions.

    Parameters
    ----------
    source
        A store is read as the batches are made; any other source is read into memory at once, if it is not there already.
    label_keys
        For each role (`batch`, `cell_type`, ...) the label column whose codes the batches carry.
    panel, view, profile
        Genes that are read, and whether as an expression view or a profile too: `tokenizer.tokenize`.
    held_out
        Rows to hold out; None: as `config.hold_out` says.

    Attributes
    ----------
    training_rows, validation_rows
        Rows of the source that are trained on and that are held out; in neither stand cells with too few genes, and in the first no group
        that `config.balance` leaves out.
    validated_rows
        The held-out cells that a validation looks at.
    plan
        The cells of every step.
    """

    def __init__(
        self,
        source: StoreSource | CellSource | MemoryCells,
        vocab: GeneVocab,
        settings: TokenizerSettings,
        config: TrainConfig,
        *,
        label_keys: Mapping[str, str] | None = None,
        panel: Int[np.ndarray, "panel"] | None = None,
        view: bool = False,
        profile: bool = False,
        held_out: Int[np.ndarray, "held_out"] | None = None,
    ) -> None:
        super().__init__()
        self.vocab, self.settings, self.config = vocab, settings, config
        if settings.zeros != 0 and isinstance(source, StoreSource):
            source.require_measured()
        columns = [*(label_keys or {}).values(), *_columns(config)]
        cells = random_cells(source, vocab, list(dict.fromkeys(columns)))
        self.cells, self.reader = cells, Reader(cells, settings, config, vocab.cls_id, label_keys, panel, view, profile)
        self._count_genes()
        self.lengths = self._n_tokens(training_settings(settings, config))
        self.training_rows, self.validation_rows = self._split(held_out)
        self.training_rows, weights = self._weighted(config.balance)
        self.validated_rows = self._validated()
        longest = int(self.lengths[self.training_rows].max())
        for name in ("tokens_per_step", "tokens_per_forward"):
            if getattr(config, name) < longest:
                found = f"train.{name} is {getattr(config, name):,}, and the longest cell has {longest:,} tokens"
                raise input_error(found, "room for one cell at least", f"raise train.{name}, or lower train.max_length")
        self.plan = BatchPlan(
            self.training_rows,
            self.lengths[self.training_rows],
            tokens_per_step=config.tokens_per_step,
            epochs=config.epochs,
            seed=config.seed,
            weights=weights,
        )

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.n_steps

    @cached_property
    def n_tokens(self) -> Int[np.ndarray, "cell"]:
        """Tokens of every cell of the source as the finished model reads it, `<cls>` included."""
        return self._n_tokens(self.settings)

    def step_batches(self, step: int, rank: int = 0, world: int = 1) -> list[TokenBatch]:
        """Make what one of `world` ranks does in a step, a batch per turn; every rank has as many turns."""
        return self.reader.turns(self._item(step), rank, world)

    def some_of(self, step: int, world: int, most_tokens: int) -> tuple[TokenBatch, int]:
        """Make the longest turn of a step, or as many of its cells as have `most_tokens` tokens; beside it the tokens of the whole turn."""
        item = self._item(step)
        part = max(deal(item.lengths, world * turns_of(self.config, world)), key=lambda part: int(item.lengths[part].sum()))
        whole = int(item.lengths[part].sum())
        n = max(1, min(len(part), len(part) * most_tokens // max(1, whole)))
        some = part[np.linspace(0, len(part), n, endpoint=False).astype(np.int64)]  # long cells and short ones, however they are sorted
        return self.reader.asked(item.rows[some], step), whole

    def names_of(self, step: int, rank: int, world: int, turn: int) -> list[str]:
        """Names of the cells of one turn, in the order of its batch."""
        item = self._item(step)
        part = deal(item.lengths, world * turns_of(self.config, world))[turn * world + rank]
        return self.cells.names(item.rows[part])

    def validation_batches(self, rank: int = 0, world: int = 1) -> list[TokenBatch]:
        """Ask every cell of `validated_rows`, once per share (once, where nothing is asked); every rank has as many batches."""
        lengths = self.n_tokens[self.validated_rows]
        n_turns = -(-int(lengths.sum()) // (world * self.config.tokens_per_forward))
        parts = deal(lengths, world * n_turns)[rank::world]
        shares = self.config.asked_shares if self.config.mode != "none" else (0.0,)
        return [self.reader.asked_once(self.validated_rows[part], share) for share in shares for part in parts]

    def training_tokens(self, n_cells: int) -> TokenBatch:
        """Training cells, at most `n_cells` and drawn by the seed, with all genes visible: what a baseline may learn from."""
        rng = np.random.default_rng([self.config.seed, _SAMPLE])
        rows = rng.choice(self.training_rows, min(n_cells, len(self.training_rows)), replace=False)
        return self.reader.tokens(np.sort(rows))

    def train_dataloader(self) -> DataLoader:
        """One long epoch from the step that the trainer stands at to the end; items are (step, batches of this rank).

        The trainer must be told not to replace the sampler (`use_distributed_sampler=False`).
        """
        rank, world = _place(self.trainer)
        self.require_cells(world)
        start = self.trainer.global_step if self.trainer else 0
        workers = self.config.workers
        return DataLoader(
            _Steps(self.reader, rank, world),
            batch_size=None,
            sampler=_Order(self, start),
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that the loader does not draw its seed, which nothing uses, from torch's global one
        )

    def _item(self, step: int) -> _Item:
        return _Item(step, self.plan.rows_of(step), self.plan.lengths_of(step))

    def _n_tokens(self, settings: TokenizerSettings) -> Int[np.ndarray, "cell"]:
        """Tokens of every cell, `<cls>` included."""
        n_measured = self._n_measured if settings.zeros != 0 else 0
        n_expressed, n_zeros = n_kept(self._n_expressed, n_measured, settings)
        return n_expressed + n_zeros + 1

    def _count_genes(self) -> None:
        """Genes that are read, expressed and measured, of every cell."""
        if (panel := self.reader.panel) is None:
            self._n_expressed, self._n_measured = self.cells.lengths, self.cells.n_measured
            return
        rows = np.arange(self.cells.n_obs)
        parts = [self.cells.rows(rows[first : first + 4096]).over(panel) for first in range(0, len(rows), 4096)]
        self._n_expressed = np.concatenate([np.diff(part.counts.indptr) for part in parts])
        self._n_measured = np.concatenate([part.n_measured for part in parts])

    def _split(self, given: Int[np.ndarray, "held_out"] | None) -> tuple[Int[np.ndarray, "cell"], Int[np.ndarray, "cell"]]:
        enough = self._n_expressed >= self.config.min_genes
        if not enough.all():
            said = "%d of %d cells with fewer than %d expressed genes of the vocabulary are left out"
            log.info(said, int((~enough).sum()), len(enough), self.config.min_genes)
        rows = np.flatnonzero(enough)
        held_out = self._held_out(rows, self.config.hold_out) if given is None else np.isin(rows, given)
        if held_out.all() or not held_out.any():
            found = f"{len(rows)} cells with enough expressed genes of the vocabulary, {int(held_out.sum())} of them held out"
            raise input_error(found, "at least one to train on and one to hold out", "give more cells, or change train.hold_out")
        return rows[~held_out], rows[held_out]

    def _held_out(self, rows: Int[np.ndarray, "cell"], hold_out: HoldOut) -> Bool[np.ndarray, "cell"]:
        if hold_out.groups:
            categories = self.cells.categories(hold_out.column)
            for name in hold_out.groups:
                if name not in categories:
                    found = f"{hold_out.column!r} has no group {name!r} to hold out"
                    raise unknown_name(found, name, categories, f"groups of {hold_out.column!r}", "train.hold_out.groups")
            return np.isin(self.cells.codes(hold_out.column)[rows], [categories.index(name) for name in hold_out.groups])
        # drawn over all cells: which ones are held out does not depend on which others have enough genes
        order = np.random.default_rng([self.config.seed, _SPLIT]).permutation(self.cells.n_obs)
        return order[rows] < max(1, round(hold_out.share * self.cells.n_obs))

    def _validated(self) -> Int[np.ndarray, "cell"]:
        """Draw cells from every held-out group alike; a group that has too few gives all it has."""
        rows, hold_out = self.validation_rows, self.config.hold_out
        order = np.random.default_rng([self.config.seed, _SPLIT, 1]).permutation(len(rows))
        groups = self.cells.codes(hold_out.column)[rows[order]] if hold_out.groups else np.zeros(len(rows), np.int64)
        place = np.empty(len(rows), np.int64)  # of each cell among those of its group
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            place[members] = np.arange(len(members))
        return np.sort(rows[order[np.argsort(place, kind="stable")[: hold_out.n_cells]]])

    def _weighted(self, balance: Balance) -> tuple[Int[np.ndarray, "cell"], Float[np.ndarray, "cell"] | None]:
        """Training rows without the groups that are left out, and how often each is seen in an epoch."""
        if not _balances(balance):
            return self.training_rows, None
        codes = self.cells.codes(balance.column)[self.training_rows]
        weights = group_weights(codes, self.cells.categories(balance.column), balance.power, balance.factors)
        seen = weights > 0
        if seen.all():
            return self.training_rows, weights
        return self.training_rows[seen], weights[seen] / weights[seen].mean()

    def require_cells(self, world: int) -> None:
        """Refuse more devices than a step has cells for."""
        per_step = self.plan.cells_per_epoch / self.plan.steps_per_epoch
        n_parts = world * turns_of(self.config, world)
        if per_step < n_parts:
            found = f"a step holds {per_step:.1f} cells on average, to be dealt to {n_parts} parts ({world} devices)"
            raise input_error(found, "a cell at least for every part", "raise train.tokens_per_step, or use fewer devices")


class _Steps(Dataset):
    """Steps, made from their rows; lives in the loading processes."""

    def __init__(self, reader: Reader, rank: int, world: int) -> None:
        self.reader, self.rank, self.world = reader, rank, world

    def __getitem__(self, item: _Item) -> tuple[int, list[TokenBatch]]:
        return item.step, self.reader.turns(item, self.rank, self.world)


class _Order(Sampler):
    """The rows of each step from `start` on; lives in the training process. Its length is that of the whole run, as Lightning counts."""

    def __init__(self, data: CellDataModule, start: int) -> None:
        self.data, self.start = data, start

    def __iter__(self) -> Iterator[_Item]:
        return (self.data._item(step) for step in range(self.start, len(self)))

    def __len__(self) -> int:
        return self.data.n_steps


def training_settings(settings: TokenizerSettings, config: TrainConfig) -> TokenizerSettings:
    """How cells become tokens while training: as later, or cut shorter."""
    return settings if config.max_length is None else settings.with_(max_length=min(config.max_length, settings.max_length))


def _columns(config: TrainConfig) -> list[str]:
    """Label columns that the settings speak of."""
    held_out = [config.hold_out.column] if config.hold_out.groups else []
    return held_out + ([config.balance.column] if _balances(config.balance) else [])


def _balances(balance: Balance) -> bool:
    return balance.power > 0 or bool(balance.factors)


def turns_of(config: TrainConfig, world: int) -> int:
    """Turns in which every one of `world` ranks does its part of a step."""
    return -(-config.tokens_per_step // (world * config.tokens_per_forward))


def _place(trainer: L.Trainer | None) -> tuple[int, int]:
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def _start_worker(_number: int) -> None:
    """Live as long as the training process.

    The signals that stop a run go to all of its processes: they are left to the training process, which ends its loading processes itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # for threads that began before and so do not block it
    threading.Thread(target=_obey, args=(os.getppid(), numbers), daemon=True).start()


def _obey(parent: int, numbers: Set[signal.Signals]) -> None:
    while signal.sigwaitinfo(numbers).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(item: Any) -> Any:
    return item
