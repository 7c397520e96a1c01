from __future__ import annotations

import logging
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from annformer.data.anndata import AnnDataSource
from annformer.scgpt import ScGPT
from annformer.train.config import PretrainConfig, TrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.plan import TrainingPlan
from annformer.train.pretrain import held_out_errors, new_model, pretrain

SMALL = {"width": 32, "n_heads": 2, "n_layers": 1, "ff_width": 32, "dropout": 0.1}


def recipe(**train) -> PretrainConfig:
    return PretrainConfig.read(
        {"model": SMALL, "train": {"epochs": 12, "learning_rate": 0.01, "validation_share": 0.2} | train}, where="test"
    )


@pytest.fixture
def run(tiny_vocab, tiny_adata, tmp_path):
    def make(**train):
        return pretrain(AnnDataSource(tiny_adata(60)), tiny_vocab, recipe(**train), tmp_path / "run", name="test")

    return make


def test_pretraining_lowers_the_held_out_error_and_logs_it(run, tmp_path, caplog):
    state = torch.random.get_rng_state()
    with warnings.catch_warnings(record=True) as met, caplog.at_level(logging.INFO, logger="annformer"):
        warnings.simplefilter("always")
        done = run()
    assert [str(warning.message) for warning in met if "lightning" in str(warning.filename)] == []
    assert torch.equal(state, torch.random.get_rng_state())
    validation = done.history["validation/gep"].dropna()
    assert len(validation) == 13
    assert validation.iloc[-1] < 0.6 * validation.iloc[0]
    assert done.errors["gep"] == pytest.approx(validation.iloc[-1], rel=1e-4)
    assert done.history["train/gep_cell_prompt"].notna().sum() == 36
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.csv"]
    assert pd.read_csv(tmp_path / "run" / "log.csv").shape == done.history.shape
    assert any("cells/s" in message for message in caplog.messages)
    assert not done.model.training


def test_same_seed_same_weights_and_another_seed_others(run):
    first, again, other = run(epochs=1), run(epochs=1), run(epochs=1, seed=1)
    assert first.model.fingerprint == again.model.fingerprint
    assert first.model.fingerprint != other.model.fingerprint


def test_the_model_says_where_it_comes_from_and_loads_again(run, tmp_path):
    done = run(epochs=1)
    done.model.save_pretrained(tmp_path / "model")
    loaded = ScGPT.from_pretrained(tmp_path / "model")
    assert loaded.name == "test"
    assert loaded.config.provenance["cells"] == {"trained on": 48, "held out": 12}
    assert loaded.fingerprint == done.model.fingerprint


def test_gene_mean_error_is_that_of_the_training_cells_means(tiny_vocab, tiny_adata):
    config = recipe()
    data = CellDataModule(AnnDataSource(tiny_adata(60)), tiny_vocab, config.tokenizer, config.train)
    seen = data.training_tokens()
    total = n = 0.0
    for tokens in data.validation_batches():
        for gene, target in zip(tokens.gene_ids.tolist(), tokens.targets.tolist(), strict=True):
            if not np.isnan(target):
                met = seen.values[seen.gene_ids == gene]
                total += (float(met.mean() if len(met) else seen.values.mean()) - target) ** 2
                n += 1
    assert held_out_errors(new_model(tiny_vocab, config), data)["gene mean"] == pytest.approx(total / n, rel=1e-5)


def make_plan(tiny_vocab, **objectives) -> TrainingPlan:
    config = PretrainConfig.read({"model": SMALL, "objectives": objectives} if objectives else {"model": SMALL}, where="test")
    return TrainingPlan(new_model(tiny_vocab, config), TrainConfig(warmup_share=0.1, last_rate_share=0.1), n_steps=100)


def test_rate_rises_then_falls_along_a_cosine(tiny_vocab):
    plan = make_plan(tiny_vocab)
    assert [plan.rate_share(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert plan.rate_share(99) == pytest.approx(0.1)
    assert plan.rate_share(54) == pytest.approx(0.55, abs=0.01)


def test_only_matrices_decay(tiny_vocab):
    decayed, others = make_plan(tiny_vocab).configure_optimizers()["optimizer"].param_groups
    assert decayed["weight_decay"] > 0 == others["weight_decay"]
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim <= 1 for parameter in others["params"])


def test_loss_is_the_weighted_sum_of_means(tiny_vocab, tiny_adata, monkeypatch):
    plan = make_plan(tiny_vocab, first={"kind": "gep", "weight": 2, "cell_prompt": True}, second={"kind": "gepc", "weight": 0.5})
    logged = {}
    monkeypatch.setattr(plan, "log", lambda name, value, **_: logged.setdefault(name, float(value)))
    data = CellDataModule(AnnDataSource(tiny_adata(20)), tiny_vocab, plan.model.tokenizer, plan.config)
    plan.eval()
    plan.validation_step(data.training_batch(0), 0)
    parts = {name: logged[f"validation/{name}"] for name in ("gep", "gep_cell_prompt", "gepc")}
    assert logged["validation/loss"] == pytest.approx(2 * parts["gep"] + 2 * parts["gep_cell_prompt"] + 0.5 * parts["gepc"], rel=1e-5)
