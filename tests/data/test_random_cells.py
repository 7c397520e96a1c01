"""Cells in memory are those of their source, with what it says of measured genes."""

from __future__ import annotations

import numpy as np
import pytest

from annformer.data.random_cells import MemoryCells, random_cells
from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.tokenizer import TokenizerSettings, tokenize


class Other:
    """A source of somebody else's: the cells of a store, in batches with a table of measured genes each, the first few without."""

    def __init__(self, store: StoreSource, n_silent: int = 0) -> None:
        self.store, self.n_silent = store, n_silent
        self.n_obs, self.obs_names, self.match = store.n_obs, store.obs_names, store.match

    def batches(self, size, **options):
        for number, batch in enumerate(self.store.batches(min(size, 17), **options)):
            if number < self.n_silent:
                yield batch._replace(measured=None)
                continue
            studies, place = np.unique(batch.measured.study, return_inverse=True)
            yield batch._replace(measured=batch.measured._replace(genes=batch.measured.genes[studies], study=place))


@pytest.fixture
def store(files, tmp_path) -> StoreSource:
    write_store(files, tmp_path / "store")
    return StoreSource(tmp_path / "store")


def test_measured_genes_of_a_source_are_kept(store, tiny_vocab):
    mine, theirs = random_cells(Other(store), tiny_vocab, ["study"]), random_cells(store, tiny_vocab)
    assert isinstance(mine, MemoryCells)
    assert len(set(theirs.n_measured.tolist())) > 1
    assert mine.n_measured.tolist() == theirs.n_measured.tolist()
    rows = np.array([150, 3, 80, 3])
    some, same = mine.rows(rows, {"batch": "study"}), theirs.rows(rows, {"batch": "study"})
    assert len(some.measured.genes) == len(np.unique(same.measured.genes, axis=0))
    assert (some.measured.genes[some.measured.study] == same.measured.genes[same.measured.study]).all()
    assert some.labels["batch"].tolist() == same.labels["batch"].tolist()
    zeros = TokenizerSettings(zeros="all", max_length=500)
    tokens, expected = (tokenize(cells, zeros, cls_id=tiny_vocab.cls_id) for cells in (some, same))
    assert tokens.gene_ids.tolist() == expected.gene_ids.tolist()
    assert tokens.values.tolist() == expected.values.tolist()


def test_batches_that_say_nothing_measured_every_gene(store, tiny_vocab):
    mine = random_cells(Other(store, n_silent=1), tiny_vocab)
    expected = random_cells(store, tiny_vocab).n_measured
    n_genes = len(mine.rows(np.array([0])).gene_ids)
    assert mine.n_measured[:17].tolist() == [n_genes] * 17
    assert mine.n_measured[17:].tolist() == expected[17:].tolist()
    silent = random_cells(Other(store, n_silent=99), tiny_vocab)
    assert silent.rows(np.array([5])).measured is None
    assert set(silent.n_measured.tolist()) == {n_genes}
