from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil
import sys

import lightning as L
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from annformer.data.anndata import AnnDataSource
from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from annformer.tokenizer import TokenizerSettings
from annformer.train.config import TrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.vocab import GeneVocab

SMALL = {"tokens_per_step": 1500, "tokens_per_forward": 600, "epochs": 2}


@pytest.fixture
def module(tiny_vocab, tiny_adata):
    """Maker of modules over cells in memory."""

    def make(n_obs=50, empty=(), max_length=1200, label_keys=None, **changes):
        adata = tiny_adata(n_obs)
        adata.X = adata.X.multiply(~np.isin(np.arange(n_obs), empty)[:, None]).tocsr()
        adata.X.eliminate_zeros()
        tokenizer = TokenizerSettings(max_length=max_length)
        return CellDataModule(AnnDataSource(adata), tiny_vocab, tokenizer, TrainConfig(**SMALL | changes), label_keys=label_keys)

    return make


@pytest.fixture(scope="module")
def store_path(tiny_adata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for name, n_obs in (("blood", 70), ("lung", 50), ("skin", 30)):
        tiny_adata(n_obs, seed=n_obs).write_h5ad(folder / f"{name}.h5ad")
    write_store([folder / f"{name}.h5ad" for name in ("blood", "lung", "skin")], folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def two_studies(tiny_adata, tiny_vocab, tmp_path_factory):
    """A store of a study with all genes and of one that lacks the first 150."""
    folder = tmp_path_factory.mktemp("two")
    tiny_adata(40, seed=1).write_h5ad(folder / "wide.h5ad")
    narrow = tiny_adata(40, seed=2)
    narrow[:, ~narrow.var_names.isin(tiny_vocab.genes[:150])].copy().write_h5ad(folder / "narrow.h5ad")
    write_store([folder / "wide.h5ad", folder / "narrow.h5ad"], folder / "store")
    return folder / "store"


def from_store(path, vocab=None, label_keys=None, **changes):
    store = StoreSource(path)
    config = TrainConfig(**SMALL | changes)
    return CellDataModule(store, vocab or store.vocab, TokenizerSettings(max_length=150), config, label_keys=label_keys)


@pytest.fixture(scope="module")
def long_run(store_path):
    return from_store(store_path, epochs=5)


def cells_of(batches) -> list[tuple]:
    """Every cell with its tokens and questions, to be compared as a multiset."""
    found = []
    for tokens in batches:
        tokens.check()
        for cell, (begin, end) in enumerate(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)):
            asked = tokens.targets[begin:end].nan_to_num(-9).tolist()
            found.append((tokens.gene_ids[begin:end].tolist(), tokens.values[begin:end].tolist(), asked, int(tokens.n_visible[cell])))
    return sorted(found)


def same(one, other) -> bool:
    fields = ("gene_ids", "values", "offsets", "n_visible", "targets")
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in fields]
    return all(torch.equal(a.nan_to_num(-9), b.nan_to_num(-9)) for a, b in pairs)


class TestSplit:
    def test_an_epoch_deals_out_every_training_cell_once(self, module):
        data = module()
        for epoch in range(2):
            first = epoch * data.plan.steps_per_epoch
            rows = np.concatenate([data.plan.rows_of(first + step) for step in range(data.plan.steps_per_epoch)])
            assert sorted(rows) == data.training_rows.tolist()

    def test_held_out_share(self, module):
        data = module(hold_out={"share": 0.2})
        assert (len(data.validation_rows), len(data.training_rows)) == (10, 40)
        assert not set(data.validation_rows) & set(data.training_rows)
        assert data.validation_rows.tolist() != module(hold_out={"share": 0.2}, seed=1).validation_rows.tolist()

    def test_held_out_groups(self, store_path):
        data = from_store(store_path, hold_out={"groups": ["lung", "skin"], "n_cells": 40})
        studies = data.cells.codes("study")
        names = data.cells.categories("study")
        assert {names[code] for code in studies[data.validation_rows]} == {"lung", "skin"}
        assert {names[code] for code in studies[data.training_rows]} == {"blood"}
        assert len(data.validation_rows) == 80
        assert np.bincount(studies[data.validated_rows], minlength=3)[[names.index("lung"), names.index("skin")]].tolist() == [20, 20]

    def test_a_small_held_out_group_gives_all_it_has(self, store_path):
        data = from_store(store_path, hold_out={"groups": ["lung", "skin"], "n_cells": 70})
        assert sorted(np.unique(data.cells.codes("study")[data.validated_rows], return_counts=True)[1]) == [30, 40]

    def test_groups_of_cells_in_memory(self, module):
        data = module(
            hold_out={"column": "cell_type", "groups": ["B cell"]}, balance={"column": "batch", "power": 1}, label_keys={"batch": "batch"}
        )
        assert data.cells.categories("cell_type") == ("B cell", "T cell", "monocyte")
        assert not (data.cells.codes("cell_type")[data.training_rows] == 0).any()
        labels = torch.cat([tokens.labels["batch"] for tokens in data.step_batches(0)])
        assert sorted(labels.tolist()) == sorted(data.cells.codes("batch")[data.plan.rows_of(0)])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"hold_out": {"groups": ["lungs"]}}, "no group 'lungs' to hold out(.|\n)*'lung'"),
            ({"hold_out": {"column": "stduy", "groups": ["lung"]}}, "no label column 'stduy'(.|\n)*'study'"),
            ({"balance": {"column": "stduy", "power": 1}}, "no label column 'stduy'"),
            ({"balance": {"factors": {"lungs": 2}}}, "no group 'lungs' to balance(.|\n)*'lung'"),
            ({"hold_out": {"groups": ["lung", "skin", "blood"]}}, "at least one to train on"),
            ({"tokens_per_step": 100}, "tokens_per_step is 100, and the longest cell has 1[0-9][0-9] tokens"),
            ({"tokens_per_forward": 100}, "tokens_per_forward is 100"),
            ({"min_genes": 1000}, "at least one to train on"),
        ],
    )
    def test_what_cannot_be_done_is_said(self, store_path, changes, words):
        with pytest.raises(InputError, match=words):
            from_store(store_path, **changes)

    def test_unknown_column_of_cells_in_memory(self, module):
        with pytest.raises(InputError, match=r"no column 'batches'(.|\n)*'batch'"):
            module(balance={"column": "batches", "power": 1})

    def test_cells_with_few_genes_are_left_out_and_counted(self, module, caplog):
        with caplog.at_level(logging.INFO):
            data = module(empty=[0, 7], min_genes=2)
        assert len(data.training_rows) + len(data.validation_rows) == 48
        assert "2 of 50 cells with fewer than 2 expressed genes" in caplog.text

    def test_one_cell_is_refused(self, module):
        with pytest.raises(InputError, match="at least one to train on"):
            module(n_obs=1)


class TestSteps:
    def test_ranks_and_turns_together_do_the_step(self, store_path):
        whole = from_store(store_path, tokens_per_forward=10_000)
        for step in range(0, whole.n_steps, 3):
            expected = cells_of(whole.step_batches(step))
            for world in (1, 2, 3, 4):
                for forward in (200, 600):
                    data = from_store(store_path, tokens_per_forward=forward)
                    ranks = [data.step_batches(step, rank, world) for rank in range(world)]
                    assert {len(turns) for turns in ranks} == {-(-1500 // (world * forward))}
                    assert cells_of([tokens for turns in ranks for tokens in turns]) == expected

    @settings(max_examples=30)
    @given(world=st.integers(1, 30), step=st.integers(0, 10))
    def test_any_world(self, long_run, world, step):
        data = long_run
        ranks = [data.step_batches(step, rank, world) for rank in range(world)]
        names = [data.names_of(step, rank, world, turn) for rank in range(world) for turn in range(len(ranks[0]))]
        assert [len(part) for part in names] == [tokens.n_cells for turns in ranks for tokens in turns]
        assert sorted(name for part in names for name in part) == sorted(data.cells.names(data.plan.rows_of(step)))
        tokens = [sum(tokens.n_tokens for tokens in turns) for turns in ranks]
        assert max(tokens) - min(tokens) <= 150 * len(ranks[0])

    def test_a_batch_is_a_function_of_seed_and_step(self, module):
        first, again, other = module().step_batches(3), module().step_batches(3), module(seed=1).step_batches(3)
        assert same(first, again)
        assert cells_of(first) != cells_of(other)

    def test_another_step_asks_anew(self, module):
        data = module(tokens_per_step=20_000, tokens_per_forward=20_000, asked_shares=(0.5,))
        assert data.plan.steps_per_epoch == 1
        assert cells_of(data.step_batches(0)) != cells_of(data.step_batches(1))

    @pytest.mark.parametrize("mode", ["ask", "hide"])
    def test_one_of_the_shares_is_asked(self, module, mode):
        data = module(asked_shares=(0.25, 0.75), mode=mode, epochs=4)
        met = set()
        for step in range(data.n_steps):
            shares = set()
            for tokens in data.step_batches(step):
                genes = tokens.check().offsets.diff() - 1
                ends = torch.cat([torch.zeros(1), torch.isfinite(tokens.targets).cumsum(0)])[tokens.offsets]
                shares |= {share for share in (0.25, 0.75) if torch.equal(ends.diff().long(), (genes * share).long())}
                assert bool((tokens.n_visible == tokens.offsets.diff()).all()) == (mode == "hide")
            assert len(shares) == 1
            met |= shares
        assert met == {0.25, 0.75}

    def test_weights_are_followed(self, store_path):
        data = from_store(store_path, balance={"power": 1.0}, epochs=30)
        codes = data.cells.codes("study")
        seen = np.bincount(np.concatenate([codes[data.plan.rows_of(step)] for step in range(data.n_steps)]))
        assert seen / seen.sum() == pytest.approx([1 / 3] * 3, abs=0.01)
        assert {code for step in range(data.n_steps) for code in data.plan.rows_of(step)} == set(data.training_rows)

    def test_more_ranks_than_cells_are_refused_beforehand(self, module):
        data = module(tokens_per_forward=200)
        data.require_cells(4)
        with pytest.raises(InputError, match="40 devices"):
            data.require_cells(40)


class TestValidation:
    def test_each_share_is_asked_of_every_cell_once(self, module):
        data = module(hold_out={"share": 0.2})
        batches = data.validation_batches()
        assert sum(tokens.n_cells for tokens in batches) == 3 * 10
        assert same(batches, data.validation_batches())

    @pytest.mark.parametrize("world", [2, 3])
    def test_ranks_together_ask_the_same(self, store_path, world):
        data = from_store(store_path, hold_out={"groups": ["skin"]})
        ranks = [data.validation_batches(rank, world) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert cells_of([tokens for batches in ranks for tokens in batches]) == cells_of(data.validation_batches())

    def test_training_tokens(self, module):
        data = module()
        assert data.training_tokens(10).check().n_cells == 10
        everything = data.training_tokens(1000)
        assert everything.n_cells == len(data.training_rows)
        assert everything.targets is None


class TestVocabulary:
    @pytest.mark.parametrize("zeros", [0.5, "all"])
    def test_zeros_are_genes_and_are_counted(self, store_path, zeros):
        store = StoreSource(store_path)
        data = CellDataModule(store, store.vocab, TokenizerSettings(zeros=zeros), TrainConfig(**SMALL))
        for step in range(3):
            tokens = data.step_batches(step)
            assert sum(batch.n_tokens for batch in tokens) == data.plan.lengths_of(step).sum()
            assert (data.plan.lengths_of(step) > data.cells.lengths[data.plan.rows_of(step)] + 1).all()
            specials = ~torch.tensor(store.vocab.is_gene)[torch.cat([batch.gene_ids for batch in tokens])]
            assert int(specials.sum()) == len(data.plan.rows_of(step))

    @pytest.mark.parametrize("zeros", [3.0, "all"])
    @pytest.mark.parametrize("own", [True, False])
    def test_no_zero_of_a_gene_that_the_study_lacks(self, two_studies, tiny_vocab, zeros, own):
        store = StoreSource(two_studies)
        vocab = store.vocab if own else GeneVocab(tiny_vocab.tokens, tiny_vocab.genes[::5])
        data = CellDataModule(store, vocab, TokenizerSettings(zeros=zeros), TrainConfig(**SMALL | {"epochs": 1}))
        met = set()
        for step in range(data.n_steps):
            tokens = data.step_batches(step)
            rows, lengths = data.plan.rows_of(step), data.plan.lengths_of(step)
            assert sorted(torch.cat([batch.offsets.diff() for batch in tokens]).tolist()) == sorted(lengths.tolist())
            for row, length in zip(rows, lengths, strict=True):
                cell = data.reader.tokens(np.array([row]))
                assert cell.n_tokens == length
                met.add(cell.n_tokens)
                genes = {vocab.tokens[i] for i in cell.gene_ids[1:].tolist()}
                assert store.codes("source", [row])[0] == 0 or not genes & set(tiny_vocab.genes[:150])
        if zeros == "all":
            wide, narrow = vocab.is_trained & vocab.is_gene, ~np.isin(vocab.tokens, tiny_vocab.genes[:150])
            assert met == {1 + int(wide.sum()), 1 + int((wide & narrow).sum())}

    def test_a_store_of_before_is_refused_with_zeros_only(self, two_studies, tmp_path):
        old = tmp_path / "old"
        shutil.copytree(two_studies, old)
        manifest = json.loads((old / "manifest.json").read_text())
        (old / "manifest.json").write_text(json.dumps(manifest | {"measured": None}))
        store = StoreSource(old)
        with pytest.raises(InputError, match="does not say which genes each of its sources measured"):
            CellDataModule(store, store.vocab, TokenizerSettings(zeros=1.0), TrainConfig(**SMALL))
        assert CellDataModule(store, store.vocab, TokenizerSettings(), TrainConfig(**SMALL)).n_steps > 0

    def test_lengths_count_genes_of_the_model(self, store_path, tiny_vocab):
        untrained = tiny_vocab.genes[::3]
        vocab = GeneVocab(tiny_vocab.tokens, untrained)
        data = from_store(store_path, vocab)
        for step in range(3):
            tokens = data.step_batches(step)
            assert sum(batch.n_tokens for batch in tokens) == data.plan.lengths_of(step).sum()
            assert not np.isin(torch.cat([batch.gene_ids for batch in tokens]), vocab.ids(untrained)).any()

    def test_genes_that_meet_count_once(self, store_path):
        store = StoreSource(store_path)
        other = GeneVocab([*store.vocab.genes[:200:2], "<cls>"])
        assert store.lengths_over(other).tolist() == np.diff(store.rows(np.arange(store.n_obs), vocab=other).counts.indptr).tolist()


class TestLoader:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_from_the_store(self, store_path, workers):
        data = from_store(store_path, workers=workers)
        loader = data.train_dataloader()
        state = torch.get_rng_state()
        items = list(loader)
        assert torch.equal(torch.get_rng_state(), state)
        assert [step for step, _ in items] == list(range(data.n_steps)) == list(range(len(loader)))
        assert all(same(turns, data.step_batches(step)) for step, turns in items)

    def test_cells_in_memory_reach_the_workers(self, module):
        data = module(workers=1, label_keys={"batch": "batch"})
        assert all(same(turns, data.step_batches(step)) for step, turns in data.train_dataloader())

    def test_what_workers_get_can_be_pickled_and_is_small(self, store_path):
        data = from_store(store_path, label_keys={"study": "study"})
        data.step_batches(0)
        text = pickle.dumps(data.train_dataloader().dataset)
        assert len(text) < 20_000
        item = next(iter(data.train_dataloader().sampler))
        assert same(pickle.loads(text)[item][1], data.step_batches(0))

    @pytest.mark.skipif(sys.platform != "linux", reason="how processes learn of a death is special to Linux")
    def test_workers_die_with_a_killed_process(self, store_path):
        fork = multiprocessing.get_context("fork")
        told, tell = fork.Pipe(duplex=False)
        process = fork.Process(target=_load_for_ever, args=(from_store(store_path, workers=2, epochs=1000), tell))
        process.start()
        workers = [psutil.Process(pid) for pid in told.recv()]
        process.kill()
        process.join()
        assert psutil.wait_procs(workers, timeout=3)[1] == []

    @pytest.mark.parametrize(("stop", "workers"), [(3, 0), (5, 1)])
    def test_trainer_goes_on_at_any_step(self, store_path, tmp_path, stop, workers):
        whole, rest = _Recorder(tmp_path, stop), _Recorder(tmp_path, stop=-1)
        _fit(whole, from_store(store_path), None)
        _fit(rest, from_store(store_path, workers=workers), tmp_path / "some.ckpt")
        assert [step for step, _ in rest.seen] == list(range(stop, len(whole.seen)))
        assert rest.seen == whole.seen[stop:]


def _load_for_ever(data, tell):
    for number, _ in enumerate(data.train_dataloader()):
        if number == 0:
            tell.send([child.pid for child in psutil.Process().children()])


class _Recorder(L.LightningModule):
    """Writes down which batches it is given, and a checkpoint after `stop` of them."""

    def __init__(self, folder, stop) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.stop, self.seen = folder, stop, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, _):
        step, turns = batch
        assert step == self.trainer.global_step
        self.seen.append((step, cells_of(turns)))
        self.manual_backward(self.weight * 1.0)
        self.optimizers().step()

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == self.stop:
            self.trainer.save_checkpoint(self.folder / "some.ckpt")


def _fit(recorder, data, checkpoint):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=data.n_steps, max_epochs=-1, accelerator="cpu", devices=1, use_distributed_sampler=False, **quiet)
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
