"""pretrain(): what it learns, what it writes, what it says of itself."""

from __future__ import annotations

import logging
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from annformer.data.anndata import AnnDataSource
from annformer.data.store import StoreSource
from annformer.errors import InputError
from annformer.scgpt import ScGPT
from annformer.train import pretrain as pretrain_module
from annformer.train import progress
from annformer.train.config import PretrainConfig
from annformer.train.pretrain import held_out_errors, new_model, prepare_data, pretrain, start
from annformer.vocab import GeneVocab

SMALL = {"width": 32, "n_heads": 2, "n_layers": 1, "ff_width": 32, "dropout": 0.0}
N_GENES, N_MARKERS = 36, 8


@pytest.fixture(autouse=True)
def _peak(monkeypatch):
    monkeypatch.setattr(progress, "peak_flops", lambda *_: 1e9)


def recipe(**train) -> PretrainConfig:
    settings = {"epochs": 1, "learning_rate": 0.005, "tokens_per_step": 1000, "validations": 2, "hold_out": {"share": 0.2}}
    return PretrainConfig.read({"model": SMALL, "min_cells": 5, "train": settings | train}, where="test")


@pytest.fixture(scope="module")
def planted(tiny_vocab) -> AnnDataSource:
    """Cells in two states: markers that only one has, other genes high in one and low in the other; and a gene that two cells express."""
    rng = np.random.default_rng(0)
    state = rng.random(200) < 0.5
    high = np.arange(N_GENES) % 2 == state[:, None]
    counts = 1 + rng.poisson(np.where(high, 20, 2))
    counts[:, :N_MARKERS] *= high[:, :N_MARKERS]
    rare = np.where(np.arange(200) < 2, 3, 0)[:, None]
    adata = ad.AnnData(
        sp.csr_matrix(np.hstack((counts, rare)), dtype=np.float32), var=pd.DataFrame(index=[*tiny_vocab.genes[:N_GENES], "VIM"])
    )
    return AnnDataSource(adata)


@pytest.fixture(scope="module")
def vocab(tiny_vocab) -> GeneVocab:
    return GeneVocab([*tiny_vocab.genes[:N_GENES], "VIM"]).with_specials()


def test_what_the_other_genes_tell_is_learned(planted, vocab, tmp_path, caplog):
    state = torch.random.get_rng_state()
    with warnings.catch_warnings(record=True) as met, caplog.at_level(logging.INFO, logger="annformer"):
        warnings.simplefilter("always")
        done = pretrain(planted, vocab, recipe(epochs=10, tokens_per_step=500, learning_rate=0.01), tmp_path / "run", name="planted")
    assert [str(warning.message) for warning in met if "lightning" in str(warning.filename)] == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert done.errors["gep"] < 0.75 * done.errors["gene mean"]
    validation = done.history["validation/gep"].dropna()
    assert len(validation) == 3
    assert validation.iloc[-1] < 0.75 * validation.iloc[0]
    assert done.errors["gep"] == pytest.approx(validation.iloc[-1], rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("checkpoints", "curves.png", "log.csv", "model", "recipe.yaml", "run.json")
    ]
    assert any("1 of 37 genes" in message and "marked untrained" in message for message in caplog.messages)
    assert not done.model.training


def test_the_model_says_what_it_did_not_learn_and_where_it_comes_from(planted, vocab, tmp_path):
    done = pretrain(planted, vocab, recipe(epochs=0.5), tmp_path / "run", name="planted")
    loaded = ScGPT.from_pretrained(tmp_path / "run" / "model")
    assert loaded.fingerprint == done.model.fingerprint
    assert loaded.name == "planted"
    assert loaded.vocab.untrained == {"VIM"}
    told = loaded.config.provenance
    assert told["cells"] == {"trained on": 160, "held out": 40}
    assert told["held_out_squared_error"] == done.errors
    assert told["recipe"]["train"]["epochs"] == 0.5
    assert len(done.validation_rows) == 40


def test_a_model_of_a_store_names_the_files_it_is_made_of(tiny_store, tmp_path):
    source = StoreSource(tiny_store)
    done = pretrain(source, source.vocab, recipe(epochs=0.1, tokens_per_step=2500), tmp_path / "run")
    corpus = done.model.config.provenance["corpus"]
    assert [(record["name"], record["cells"]) for record in corpus] == [("blood", 60), ("lung", 40)]
    assert [record["sha256"] for record in corpus] == [record.sha256 for record in source.manifest.sources]


def test_same_seed_same_weights_and_another_seed_others(planted, vocab, tmp_path):
    first, again, other = (
        pretrain(planted, vocab, recipe(epochs=0.3, seed=seed), tmp_path / str(number)).model.fingerprint
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_genes_start_where_the_cells_put_them(planted, vocab):
    data = prepare_data(planted, vocab, recipe())
    genes = torch.arange(len(vocab))[torch.from_numpy(vocab.is_gene.copy())][:N_GENES]
    same = torch.arange(N_GENES)[:, None] % 2 == torch.arange(N_GENES) % 2
    apart = {}
    for kind in ("random", "svd"):
        model = new_model(data.vocab, recipe())
        start(model, data, recipe(gene_init=kind))
        placed = F.normalize(model.encoder.gene.weight.detach()[genes], dim=1)
        alike = placed @ placed.T
        apart[kind] = float(alike[same].mean() - alike[~same].mean())
    assert abs(apart["random"]) < 0.1
    assert apart["svd"] > 0.3


def test_the_first_prediction_is_the_mean_value(planted, vocab):
    config = recipe()
    data = prepare_data(planted, vocab, config)
    model = new_model(data.vocab, config)
    before = held_out_errors(model, data)["gep"]
    start(model, data, config)
    assert held_out_errors(model, data)["gep"] < 0.7 * before


def test_gene_mean_error_is_that_of_the_training_cells_means(planted, vocab):
    config = recipe()
    data = prepare_data(planted, vocab, config)
    seen = data.training_tokens(10_000)
    total = n = 0.0
    genes = torch.ones(seen.n_tokens, dtype=torch.bool)
    genes[seen.offsets[:-1]] = False  # what stands first is <cls>
    overall = float(seen.values[genes].mean())
    for tokens in data.validation_batches():
        for gene, target in zip(tokens.gene_ids.tolist(), tokens.targets.tolist(), strict=True):
            if not np.isnan(target):
                met = seen.values[seen.gene_ids == gene]
                total += (float((met.sum() + 3 * overall) / (len(met) + 3)) - target) ** 2
                n += 1
    assert held_out_errors(new_model(data.vocab, config), data)["gene mean"] == pytest.approx(total / n, rel=1e-5)


def test_predictions_that_are_not_numbers_are_no_perfect_ones(planted, vocab):
    data = prepare_data(planted, vocab, recipe())
    model = new_model(data.vocab, recipe())
    torch.nn.init.constant_(model.objectives["gep"].value[-1].bias, torch.nan)
    errors = held_out_errors(model, data)
    assert np.isnan(errors["gep"])
    assert errors["gepc"] > 0
    assert errors["gene mean"] > 0


def test_ranks_look_at_their_shares_and_get_the_errors_of_all(planted, vocab, monkeypatch):
    data = prepare_data(planted, vocab, recipe())
    model = new_model(data.vocab, recipe())
    whole = held_out_errors(model, data)
    shares = []
    monkeypatch.setattr(pretrain_module, "n_ranks", lambda: 2)
    monkeypatch.setattr(pretrain_module, "of_all_ranks", lambda share: (shares.append(share), shares)[1])
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        errors = held_out_errors(model, data)
    assert 0 < shares[0][1] < shares[0][1] + shares[1][1]
    assert errors == pytest.approx(whole, rel=1e-5)


def test_the_first_prediction_is_the_mean_of_what_is_asked_zeros_too(planted, vocab):
    config = PretrainConfig.read(recipe().model_dump(mode="json") | {"tokenizer": {"zeros": "all"}}, where="test")
    data = prepare_data(planted, vocab, config)
    model = new_model(data.vocab, config)
    start(model, data, config)
    seen = data.training_tokens(512)
    genes = seen.gene_ids != vocab.cls_id
    assert (seen.values[genes] == 0).any()
    assert model.objectives["gep"].value[-1].bias.item() == pytest.approx(float(seen.values[genes].mean()), rel=1e-5)


@pytest.fixture(scope="module")
def poor(tiny_vocab) -> AnnDataSource:
    """120 cells of 12 genes; half of them also of a few genes that hardly any other cell has."""
    rng = np.random.default_rng(3)
    counts = np.zeros((120, N_GENES))
    counts[:, :12] = 1 + rng.poisson(3, (120, 12))
    some = np.arange(120) % 2 == 0
    counts[some, 12 + rng.integers(N_GENES - 12, size=60)] = 2
    counts[~some, 0] = 0
    adata = ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), var=pd.DataFrame(index=list(tiny_vocab.genes[:N_GENES])))
    adata.obs["study"] = np.where(rng.random(120) < 0.3, "small", "large")
    return AnnDataSource(adata)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_cells_were_not_counted_whatever_cells_have_enough_genes(poor, vocab, seed):
    made = recipe(min_genes=12, seed=seed).model_dump(mode="json")
    before, after = (prepare_data(poor, vocab, PretrainConfig.read(made | {"min_cells": n}, where="test")) for n in (0, 20))
    assert after.vocab.untrained
    assert not set(after.validation_rows) & set(before.training_rows)
    batch = next(iter(poor.batches(120, vocab=vocab)))
    met = np.bincount(batch.gene_ids[batch.counts[after.training_rows].indices], minlength=len(vocab))
    learned = after.vocab.is_trained & after.vocab.is_gene
    assert (met[learned] >= 20).all()


def test_a_group_that_is_left_out_is_not_trained_on(poor, vocab):
    config = recipe(balance={"column": "study", "factors": {"small": 0}})
    data = prepare_data(poor, vocab, config)
    whole = prepare_data(poor, vocab, recipe(balance={"column": "study", "factors": {"small": 1}}))
    codes, small = data.cells.codes("study"), data.cells.categories("study").index("small")
    assert 0 < len(data.training_rows) < len(whole.training_rows)
    assert data.training_rows.tolist() == [row for row in whole.training_rows if codes[row] != small]
    assert data.plan.cells_per_epoch == len(data.training_rows)


def test_a_refused_start_leaves_nothing(planted, vocab, tmp_path):
    with pytest.raises(InputError, match=r"train\.tokens_per_step"):
        pretrain(planted, vocab, recipe(tokens_per_step=10), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_cce_without_dropout_is_said_to_contrast_nothing(planted, vocab, tmp_path, caplog, dropout):
    config = recipe(tokens_per_step=10)  # refused soon after
    config = config.with_(objectives={"gep": {"kind": "gep"}, "mine": {"kind": "cce"}}, model=SMALL | {"dropout": dropout})
    with pytest.raises(InputError, match="tokens_per_step"):
        pretrain(planted, vocab, config, tmp_path / "run")
    assert ("both will be the same" in caplog.text) == (dropout == 0)


def test_a_network_with_batches_is_refused(planted, vocab):
    config = recipe()
    with pytest.raises(InputError, match="they are learned by fine-tuning"):
        prepare_data(planted, vocab, config.with_(model=config.model | {"n_batches": 2, "batch_context": True}))


@pytest.mark.parametrize("objective", [{"kind": "cls", "n_classes": 3}, {"kind": "dar", "n_batches": 2}, {"kind": "anchor"}])
def test_objectives_that_learn_from_labels_are_refused(planted, vocab, objective):
    config = recipe()
    config = config.with_(objectives={"gep": {"kind": "gep"}, "mine": objective})
    with pytest.raises(InputError, match=r"objectives\.mine, which learn from labels"):
        prepare_data(planted, vocab, config)
