from __future__ import annotations

import numpy as np
import pytest
import torch

from annformer.data.anndata import AnnDataSource
from annformer.errors import InputError
from annformer.tokenizer import TokenizerSettings
from annformer.train.config import TrainConfig
from annformer.train.datamodule import CellDataModule


@pytest.fixture
def module(tiny_vocab, tiny_adata):
    def make(n_obs=50, empty=(), **settings):
        adata = tiny_adata(n_obs)
        adata.X = adata.X.multiply(~np.isin(np.arange(n_obs), empty)[:, None]).tocsr()
        adata.X.eliminate_zeros()
        return CellDataModule(AnnDataSource(adata), tiny_vocab, TokenizerSettings(), TrainConfig(**settings))

    return make


def test_an_epoch_deals_out_every_training_cell_once(module):
    data = module(cells_per_step=8, epochs=2)
    assert data.steps_per_epoch == 6
    for epoch in range(2):
        steps = [data.rows_of(epoch * 6 + place) for place in range(6)]
        assert sorted(np.concatenate(steps)) == data.training_rows.tolist()
        assert {len(rows) for rows in steps} <= {7, 8}
    assert data.rows_of(0).tolist() != data.rows_of(6).tolist()


def test_held_out_cells_are_never_trained_on(module):
    data = module(validation_share=0.2)
    assert len(data.validation_rows) == 10
    assert not set(data.validation_rows) & set(data.training_rows)


def test_a_batch_is_a_function_of_seed_and_step(module):
    first, again, other = module().training_batch(3), module().training_batch(3), module(seed=1).training_batch(3)
    assert torch.equal(first.gene_ids, again.gene_ids)
    assert torch.equal(first.targets, again.targets) or torch.allclose(first.targets, again.targets, equal_nan=True)
    assert first.gene_ids.tolist() != other.gene_ids.tolist()


def test_batches_ask_one_of_the_shares(module):
    data = module(asked_shares=(0.25, 0.75))
    met = set()
    for step in range(20):
        tokens = data.training_batch(step).check()
        genes = tokens.offsets.diff() - 1
        asked = genes - (tokens.n_visible - 1)
        share = next(share for share in (0.25, 0.75) if torch.equal(asked, (genes * share).long()))
        met.add(share)
    assert met == {0.25, 0.75}


def test_validation_asks_each_share_of_every_held_out_cell(module):
    data = module(validation_share=0.2)
    batches = data.validation_batches()
    assert sum(tokens.n_cells for tokens in batches) == 3 * 10
    again = data.validation_batches()
    assert all(torch.equal(a.gene_ids, b.gene_ids) for a, b in zip(batches, again, strict=True))


def test_cells_without_genes_are_left_out(module):
    data = module(empty=[0, 7])
    assert len(data.training_rows) + len(data.validation_rows) == 48
    assert {0, 7}.isdisjoint(data.cells.rows)


def test_one_cell_is_refused(module):
    with pytest.raises(InputError, match="at least two"):
        module(n_obs=1)
