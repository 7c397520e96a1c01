"""What happens between the steps: learning rate, validation, numbers that are not finite, devices that are not there."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from annformer.data.store import StoreSource
from annformer.errors import InputError
from annformer.objectives.protocol import Loss
from annformer.scgpt import ScGPT
from annformer.train import checkpoint, progress
from annformer.train.config import Machine, PretrainConfig, TrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.fit import fit, require_machine
from annformer.train.flops import batch_flops
from annformer.train.offenders import cells_without_finite_loss, take_cells
from annformer.train.plan import TrainingPlan
from annformer.train.pretrain import new_model

SMALL = {"width": 16, "n_heads": 2, "n_layers": 1, "ff_width": 16, "dropout": 0.1}
PEAK = 1e9


@pytest.fixture(autouse=True)
def _peak(monkeypatch):
    monkeypatch.setattr(progress, "peak_flops", lambda *_: PEAK)


@pytest.fixture
def parts(tiny_store, tiny_vocab):
    """Maker of a plan and its cells: 12 steps, two turns each."""

    def make(**train) -> tuple[TrainingPlan, CellDataModule]:
        settings = {
            "epochs": 3,
            "tokens_per_step": 2500,
            "tokens_per_forward": 1300,
            "log_steps": 1,
            "checkpoint_steps": 1,
            "validations": 3,
        }
        config = PretrainConfig.read({"model": SMALL, "train": settings | train}, where="test")
        source = StoreSource(tiny_store)
        data = CellDataModule(source, source.vocab, config.tokenizer, config.train)
        return TrainingPlan(new_model(source.vocab, config), config.train, data.n_steps), data

    return make


def genes_of(tokens, cell: int) -> tuple[int, ...]:
    begin, end = tokens.offsets[cell : cell + 2].tolist()
    return tuple(sorted(tokens.gene_ids[begin:end].tolist()))


def spoil(monkeypatch, data: CellDataModule, rows: list[int], value: float) -> None:
    """Give the losses of batches that hold one of the cells a term that is not finite."""
    bad = {genes_of(data.reader.tokens(np.array([row])), 0) for row in rows}
    losses = ScGPT.losses

    def spoiled(model, tokens, *args, **options):
        met = sum(genes_of(tokens, cell) in bad for cell in range(tokens.n_cells))
        found = losses(model, tokens, *args, **options)
        return {name: Loss(loss.total + value if met else loss.total, loss.n) for name, loss in found.items()}

    monkeypatch.setattr(ScGPT, "losses", spoiled)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_cells_without_a_finite_loss_are_named_and_the_last_checkpoint_stays(parts, tmp_path, monkeypatch, value):
    plan, data = parts()
    step = 5
    rows = [int(row) for row in data.plan.rows_of(step)[[2, 9]]]
    names = data.cells.names(np.array(rows))
    real = TrainingPlan.training_step

    def training_step(self, batch, index):
        if batch[0] == step:  # not before: all cells have been seen once by then
            spoil(monkeypatch, data, rows, value)
        return real(self, batch, index)

    monkeypatch.setattr(TrainingPlan, "training_step", training_step)
    with pytest.raises(InputError) as error:
        fit(plan, data, tmp_path)
    message = str(error.value)
    assert f"the loss of step {step} is not finite" in message
    assert sorted(message.partition("the cells are ")[2].split(".\n")[0].split(", ")) == sorted(names)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert checkpoint.step_of(found[0]) == step
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found[1]["state_dict"].values())


def test_weights_that_make_every_cell_infinite_name_ten_of_them(parts, tmp_path):
    plan, data = parts()
    with torch.no_grad():
        next(plan.model.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match=r"step 0 is not finite .* and \d+ more"):
        fit(plan, data, tmp_path)


def test_a_gradient_that_is_not_finite_is_said(parts, tmp_path):
    plan, data = parts(validations=0)
    next(plan.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(InputError, match="the gradient of step 0 is not finite"):
        fit(plan, data, tmp_path)


def test_cells_are_cut_out_of_a_batch_whole(parts):
    plan, data = parts()
    tokens = data.step_batches(0)[0]
    some = take_cells(tokens, torch.tensor([3, 1]))
    some.check()
    assert some.n_cells == 2
    assert [genes_of(some, 0), genes_of(some, 1)] == [genes_of(tokens, 3), genes_of(tokens, 1)]
    assert some.n_visible.tolist() == tokens.n_visible[[3, 1]].tolist()
    assert cells_without_finite_loss(plan.model.eval(), tokens, tokens.n_cells) == []


def test_the_log_has_delivered_cells_and_tokens_and_the_validations_asked_for(parts, tmp_path, caplog):
    plan, data = parts(log_steps=4)
    with caplog.at_level(logging.INFO, logger="annformer"):
        history = fit(plan, data, tmp_path)
    assert data.n_steps == 12
    assert history["step"].tolist() == [0, 4, 8, 12]
    assert history["validation/loss"].notna().all()
    assert history["train/loss"].notna().tolist() == [False, True, True, True]
    said = [message for message in caplog.messages if "cells/s" in message]
    assert len(said) == 3
    assert all("tokens/s, MFU " in message for message in said)
    rows = history.iloc[1:]
    cells = [sum(len(data.plan.rows_of(step)) for step in range(end - 4, end)) for end in (4, 8, 12)]
    tokens = [sum(int(data.plan.lengths_of(step).sum()) for step in range(end - 4, end)) for end in (4, 8, 12)]
    flops = [sum(batch_flops(plan.model, turn) for step in range(end - 4, end) for turn in data.step_batches(step)) for end in (4, 8, 12)]
    seconds = np.array(cells) / rows["cells_per_second"]
    np.testing.assert_allclose(np.array(tokens) / rows["tokens_per_second"], seconds)
    np.testing.assert_allclose(np.array(flops) / PEAK / rows["mfu"], seconds)
    assert pd.read_csv(tmp_path / "log.csv")["epoch"].max() == 3


def test_a_run_without_validations_has_none(parts, tmp_path):
    plan, data = parts(validations=0, epochs=0.4)
    assert not any(name.startswith("validation") for name in fit(plan, data, tmp_path).columns)


def _validated(monkeypatch, values):
    """Let the validations find these losses one after the other."""
    losses = iter(values)
    monkeypatch.setattr(TrainingPlan, "mean_losses", lambda *_: {"gep": (value := next(losses)), "dar": -100 * value, "loss": 0.0})
    monkeypatch.setattr(TrainingPlan, "weight", lambda *_: 1.0)


def test_patience_ends_a_run_and_the_best_weights_stay(parts, tmp_path, monkeypatch):
    plan, data = parts(validations=12, patience=2)
    _validated(monkeypatch, [5, 4, 3, 3.5, 3.2, 1, 1])
    seen = {}
    judge = TrainingPlan.judge

    def watch(self, losses, step):
        seen[step] = self.model.encoder.gene.weight.detach().clone()
        judge(self, losses, step)

    monkeypatch.setattr(TrainingPlan, "judge", watch)
    history = fit(plan, data, tmp_path)
    assert history["step"].max() == 4
    assert torch.equal(plan.model.encoder.gene.weight, seen[2])
    assert not torch.equal(seen[2], seen[4])
    again, data = parts(validations=12, patience=2)
    assert fit(again, data, tmp_path)["step"].max() == 4, "it is over, also for the same call again"
    assert torch.equal(again.model.encoder.gene.weight, seen[2])


COMPILED_AND_NOT = """
import sys, torch
from annformer.data.store import StoreSource
from annformer.train.config import Machine, PretrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.fit import compiled, fit
from annformer.train.plan import TrainingPlan
from annformer.train.pretrain import new_model
from pathlib import Path

source, ends = StoreSource(sys.argv[1]), []
for wanted in (False, True):
    network = {"width": 16, "n_heads": 2, "n_layers": 1, "ff_width": 16, "dropout": 0.0}
    train = {"epochs": 1, "tokens_per_step": 2500, "validations": 0, "compile": wanted}
    config = PretrainConfig.read({"model": network, "train": train}, where="test")
    data = CellDataModule(source, source.vocab, config.tokenizer, config.train)
    plan = TrainingPlan(new_model(source.vocab, config), config.train, data.n_steps)
    out = Path(sys.argv[2]) / str(wanted)
    out.mkdir()
    fit(plan, data, out, Machine(accelerator="cpu"))
    print(wanted, torch._dynamo.utils.counters["frames"]["ok"] if wanted else 0, "by_token" in vars(plan.model.encoder.layers[0]))
    ends.append(plan.model.state_dict())
print(max(float((ends[1][name] - tensor).abs().max()) for name, tensor in ends[0].items()))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_train_alike_and_leave_the_model_as_it_was(tiny_store, tmp_path):
    words = [sys.executable, "-c", COMPILED_AND_NOT, str(tiny_store), str(tmp_path)]  # checks of shapes in tests cannot be compiled
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert said[:3] == ["False", "0", "False"] and said[3] == "True" and int(said[4]) > 0 and said[5] == "False"
    assert float(said[6]) < 1e-4  # a step moves a weight by up to 1e-3


def test_without_patience_the_last_weights_stay(parts, tmp_path, monkeypatch):
    plan, data = parts(validations=12)
    _validated(monkeypatch, range(13))
    assert fit(plan, data, tmp_path)["step"].max() == 12
    assert plan.best is None


def test_rate_falls_with_every_epoch(parts):
    plan, _ = parts()
    config = TrainConfig(epochs=5, schedule="epochs", epoch_decay=0.5, warmup_share=0)
    shares = [TrainingPlan(plan.model, config, n_steps=50).rate_share(step) for step in (9, 10, 25, 49)]
    assert shares == [1, 0.5, 0.25, 0.0625]


def test_rate_rises_then_falls_along_a_cosine(parts):
    plan, _ = parts()
    plan = TrainingPlan(plan.model, TrainConfig(warmup_share=0.1, last_rate_share=0.1), n_steps=100)
    assert [plan.rate_share(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert plan.rate_share(99) == pytest.approx(0.1)
    assert plan.rate_share(54) == pytest.approx(0.55, abs=0.01)


def test_only_matrices_decay(parts):
    decayed, others = parts()[0].configure_optimizers().param_groups
    assert decayed["weight_decay"] > 0 == others["weight_decay"]
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim <= 1 for parameter in others["params"])


@pytest.mark.parametrize(
    ("n_gpus", "machine", "words"),
    [
        (0, {"accelerator": "cuda"}, "torch sees none"),
        (2, {"devices": 3}, "torch sees 2"),
        (0, {"devices": 2}, None),
        (2, {"accelerator": "cpu", "devices": 3}, None),
        (2, {}, None),
    ],
)
def test_devices_that_are_not_there_are_refused(monkeypatch, n_gpus, machine, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    if words is None:
        require_machine(Machine(**machine))
        return
    with pytest.raises(InputError, match=words):
        require_machine(Machine(**machine))
