"""`annformer pretrain`: words and recipe in, a run and one clear summary out."""

from __future__ import annotations

import pytest

from annformer.cli import main
from annformer.train import progress

RECIPE = """
model: {width: 16, n_heads: 2, n_layers: 1, ff_width: 16}
train: {epochs: 1, tokens_per_step: 2500, validations: 1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "peak_flops", lambda *_: 1e9)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def test_a_store_becomes_a_model_and_a_finished_run_is_overwritten_only_when_asked(tiny_store, folder, capsys):
    words = ["pretrain", str(tiny_store), "--recipe", "small.yaml", "--out", "mine", "--set", "train.seed=5", "model.n_layers=2"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "held-out squared error in bins²: gep " in out
    assert "mine/model is the model" in out
    assert "step 4 of 4: loss" in err
    assert "seed: 5" in (folder / "mine" / "recipe.yaml").read_text()
    assert main(["inspect", "mine/model"]) == 0
    said = capsys.readouterr().out
    assert "mine" in said

    before = (folder / "mine" / "model" / "model.safetensors").read_bytes()
    assert main(words) == 2
    assert "the run in mine is finished" in capsys.readouterr().err
    assert main([*words[:-2], "train.seed=6", "--overwrite", "--name", "other"]) == 0
    assert (folder / "mine" / "model" / "model.safetensors").read_bytes() != before
    assert '"other"' in (folder / "mine" / "model" / "config.json").read_text()


def test_a_plan_says_what_it_would_take_and_writes_nothing(tiny_store, folder, capsys, monkeypatch):
    from annformer.train import estimate

    monkeypatch.setattr(estimate, "peak_flops", lambda *_: 1e9)
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", str(tiny_store), "--recipe", "small.yaml", "--plan", "--price_per_hour", "2.5"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "3 steps", "memory", "an epoch", "2.5 per device and hour"):
        assert word in out, out
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no --out is given"),
        ("--out run --recipe pretrain-tinny", "'pretrain-tinny'"),
        ("--out run --set train.epochs", "--set train.epochs"),
        ("--out run --set trayn.epochs=3", "--set trayn.epochs=3"),
        ("--out run --set train.epoch=3", "train.epoch"),
        ("--out run --set train.epochs=many", "train.epochs"),
        ("--out run --set model.n_heads=3", "multiple of n_heads"),
        ("--out run --set train.tokens_per_step=20", "train.tokens_per_step is 20"),
        ("--out run --set train.hold_out.groups=[spleen]", "'spleen'"),
        ("--out run --logger tensorbord", "--logger"),
        ("--out run --logger wandb", "pip install wandb"),
        ("--out small.yaml", "small.yaml is a file"),
        ("--out . ", "which no run wrote"),
        ("--out . --overwrite", "which no run wrote"),
    ],
)
def test_mistakes(words, said, capsys, folder, tiny_store, monkeypatch):
    monkeypatch.setattr("annformer.train.log.find_spec", lambda _: None)
    before = sorted(folder.rglob("*"))
    recipe = [] if "--recipe" in words else ["--recipe", "small.yaml"]
    assert main(["pretrain", str(tiny_store), *recipe, *words.split()]) == 2
    err = capsys.readouterr().err
    assert said in err, err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("store", ["nowhere", "small.yaml", "."])
def test_what_is_no_store_is_said(store, capsys, folder):
    assert main(["pretrain", store, "--out", "run"]) == 2
    assert "is not a store" in capsys.readouterr().err
    assert not (folder / "run").exists()
