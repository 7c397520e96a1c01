"""Cells -> batches of asked genes; which cells stand in which step is a pure function of the seed."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from annformer.data.source import CellSource
from annformer.errors import input_error
from annformer.masking import ask
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.tokens import CellBatch, TokenBatch
from annformer.train.config import TrainConfig
from annformer.vocab import GeneVocab

_CELLS_PER_VALIDATION_BATCH = 64


class CellDataModule(L.LightningDataModule):
    """Training and validation batches from a source whose cells fit in memory as CSR.

    Step `i` of training is always the same batch: its rows come from the permutation of its epoch, ties and questions are hashes of
    (seed, step). Validation asks each share once of every cell that was held out, always the same questions.

    Parameters
    ----------
    source
        Cells without any gene of the vocabulary are left out.
    """

    def __init__(self, source: CellSource, vocab: GeneVocab, settings: TokenizerSettings, config: TrainConfig) -> None:
        super().__init__()
        self.vocab, self.settings, self.config = vocab, settings, config
        self.cells = _read(source, vocab)
        order = np.random.default_rng([config.seed, 0]).permutation(len(self.cells.rows))
        n_validation = max(1, round(config.validation_share * len(order)))
        self.validation_rows, self.training_rows = np.sort(order[:n_validation]), np.sort(order[n_validation:])
        if not len(self.training_rows):
            found = f"{len(order)} cells with expressed genes of the vocabulary"
            raise input_error(found, "at least two: one to train on, one to hold out", "give more cells")
        self.steps_per_epoch = -(-len(self.training_rows) // config.cells_per_step)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def rows_of(self, step: int) -> Int[np.ndarray, "cell"]:
        """Cells of a training step; every epoch deals all training cells out in nearly equal batches."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, 1, epoch]).permutation(self.training_rows)
        return np.array_split(order, self.steps_per_epoch)[place]

    def training_batch(self, step: int) -> TokenBatch:
        """Make the batch of a training step."""
        tokens = self._tokens(self.rows_of(step), step)
        return ask(tokens, self.config.asked_shares, seed=self.config.seed, step=step)

    def validation_batches(self) -> list[TokenBatch]:
        """Ask every held-out cell, once per share of `asked_shares`."""
        n = -(-len(self.validation_rows) // _CELLS_PER_VALIDATION_BATCH)
        parts = [self._tokens(rows, step=0) for rows in np.array_split(self.validation_rows, n)]
        return [ask(tokens, [share], seed=self.config.seed) for share in self.config.asked_shares for tokens in parts]

    def training_tokens(self) -> TokenBatch:
        """All training cells with all their genes visible: what a baseline may learn from."""
        return self._tokens(self.training_rows, step=0)

    def train_dataloader(self) -> DataLoader:
        """One long epoch of `n_steps` batches."""
        return _loader(_Steps(self), self.n_steps)

    def val_dataloader(self) -> DataLoader:
        """Serve the held-out questions, made once."""
        batches = self.validation_batches()
        return _loader(batches, len(batches))

    def _tokens(self, rows: Int[np.ndarray, "cell"], step: int) -> TokenBatch:
        return tokenize(_take(self.cells, rows), self.settings, cls_id=self.vocab.cls_id, step=step)


class _Steps(Dataset):
    def __init__(self, data: CellDataModule) -> None:
        self.data = data

    def __getitem__(self, step: int) -> TokenBatch:
        return self.data.training_batch(step)


def _loader(batches: Dataset | list[TokenBatch], n: int) -> DataLoader:
    # the generator is there so that the loader does not draw its seed, which nothing uses, from torch's global one
    return DataLoader(batches, batch_size=None, sampler=range(n), collate_fn=_as_it_is, generator=torch.Generator())  # type: ignore[arg-type]


def _as_it_is(tokens: TokenBatch) -> TokenBatch:
    return tokens


def _read(source: CellSource, vocab: GeneVocab) -> CellBatch:
    cells = next(iter(source.batches(source.n_obs, vocab=vocab)))
    return _take(cells, np.flatnonzero(np.diff(cells.counts.indptr)))


def _take(cells: CellBatch, rows: Int[np.ndarray, "cell"]) -> CellBatch:
    return cells._replace(
        counts=cells.counts[rows], rows=cells.rows[rows], labels={name: label[rows] for name, label in cells.labels.items()}
    )
