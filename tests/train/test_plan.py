"""What a step does in one process: its counts, its turns, the size of its gradient."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from annformer.data.anndata import AnnDataSource
from annformer.tokenizer import TokenizerSettings
from annformer.train.config import Machine, PretrainConfig
from annformer.train.datamodule import CellDataModule
from annformer.train.fit import fit
from annformer.train.plan import TrainingPlan
from annformer.train.pretrain import new_model

OBJECTIVES = {
    "gep": {"kind": "gep", "cell_prompt": True, "zero_probability": True},
    "gepc": {"kind": "gepc", "zero_probability": True},
    "affine": {"kind": "affine", "zero_probability": True},
    "ecs": {"kind": "ecs"},
    "cce": {"kind": "cce"},
    "cls": {"kind": "cls", "n_classes": 3},
    "dar": {"kind": "dar", "n_batches": 2},
}


@pytest.fixture
def parts(tiny_vocab, tiny_adata):
    """Maker of a plan and its data."""

    def make(objectives=None, **train):
        recipe = {
            "model": {"width": 16, "n_heads": 2, "n_layers": 2, "ff_width": 16, "dropout": 0.0},
            "train": {"epochs": 0.5, "validations": 0, "log_steps": 1, "tokens_per_step": 1000, "tokens_per_forward": 1000} | train,
        }
        config = PretrainConfig.read(recipe | ({"objectives": objectives} if objectives else {}), where="test")
        keys = {"batch": "batch", "cell_type": "cell_type"}
        source = AnnDataSource(tiny_adata(60))
        data = CellDataModule(source, tiny_vocab, TokenizerSettings(max_length=100), config.train, label_keys=keys)
        return TrainingPlan(new_model(tiny_vocab, config), config.train, data.n_steps), data

    return make


@pytest.fixture
def run(parts, tmp_path):
    def make(name, **train) -> pd.DataFrame:
        plan, data = parts(**train)
        (tmp_path / name).mkdir()
        log = fit(plan, data, tmp_path / name, Machine(accelerator="cpu"))
        return log.filter(regex="^train/(?!learning)")

    return make


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_is_counted_beforehand_is_what_the_loss_is_a_sum_over(parts, kind):
    plan, data = parts({kind: OBJECTIVES[kind]})
    (tokens,) = data.step_batches(0)
    tokens.labels["cell_type"][:3] = -1  # cells without a label
    losses, counts = plan.model.losses(tokens), plan.model.objectives[kind].counts(tokens)
    assert {name: float(loss.n) for name, loss in losses.items()} == {name: float(n) for name, n in counts.items()}
    assert all(n > 0 for n in counts.values())


def test_a_step_in_turns_is_the_step_at_once(run):
    at_once, in_turns = run("at once"), run("in turns", tokens_per_forward=150)
    pd.testing.assert_frame_equal(in_turns, at_once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_gradients_of_the_same_size(run, precision):
    whole, half = run("whole", epochs=2), run("half", epochs=2, precision=precision)
    assert half["train/loss"].iloc[-1] == pytest.approx(whole["train/loss"].iloc[-1], rel=0.2)
    # fp16 skips its first steps, until its gradients fit; they are a thousand times as large while they are computed
    assert half["train/gradient_norm"].iloc[-1] == pytest.approx(whole["train/gradient_norm"].iloc[-1], rel=0.5)


def test_gradients_are_cut_to_their_length_and_logged_as_they_were(parts):
    plan, data = parts(precision="32", clip_norm=0.5)
    (tokens,) = data.step_batches(0)
    sum(loss.mean for loss in plan.model.losses(tokens).values()).backward()
    found = torch.stack([parameter.grad.norm() for parameter in plan.parameters() if parameter.grad is not None]).norm()

    class NoTrainer:
        precision_plugin = None

    plan._trainer = NoTrainer()
    plan.on_before_optimizer_step(None)
    left = torch.stack([parameter.grad.norm() for parameter in plan.parameters() if parameter.grad is not None]).norm()
    assert found > 1
    assert plan.gradient_norm == pytest.approx(float(found), rel=1e-5)
    assert float(left) == pytest.approx(0.5, rel=1e-4)
