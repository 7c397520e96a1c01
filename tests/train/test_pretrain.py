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
    overall = float(seen.values.mean())
    for tokens in data.validation_batches():
        for gene, target in zip(tokens.gene_ids.tolist(), tokens.targets.tolist(), strict=True):
            if not np.isnan(target):
                met = seen.values[seen.gene_ids == gene]
                total += (float((met.sum() + 3 * overall) / (len(met) + 3)) - target) ** 2
                n += 1
    assert held_out_errors(new_model(data.vocab, config), data)["gene mean"] == pytest.approx(total / n, rel=0.02)


def test_a_refused_start_leaves_nothing(planted, vocab, tmp_path):
    with pytest.raises(InputError, match=r"train\.tokens_per_step"):
        pretrain(planted, vocab, recipe(tokens_per_step=10), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
