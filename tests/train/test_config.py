from __future__ import annotations

from importlib.resources import files

import pytest

from annformer.errors import InputError
from annformer.train.config import Machine, PretrainConfig, TrainConfig

RECIPES = sorted((path for path in (files("annformer") / "recipes").iterdir() if path.name.startswith("pretrain-")), key=lambda p: p.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_reads_and_gives_a_network(path, tiny_vocab):
    config = PretrainConfig.from_yaml(path.read_text(encoding="utf-8"), where=path.name)
    assert config.network(tiny_vocab).vocab_size == len(tiny_vocab)
    assert set(config.objectives) >= {"gep", "gepc"}


def test_an_empty_recipe_is_the_published_pair_of_objectives():
    config = PretrainConfig.from_yaml("", where="nothing")
    assert config.objectives["gep"].model_dump()["cell_prompt"]
    assert config.train.asked_shares == (0.25, 0.5, 0.75)


def test_what_a_recipe_says_is_what_it_reads_back():
    config = PretrainConfig.from_yaml("train: {hold_out: {column: study, groups: [a, b]}, balance: {factors: {a: 2}}}", where="recipe")
    assert PretrainConfig.read(config.model_dump(mode="json"), where="again") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {epoch: 3}", "train.epoch"),
        ("train: {cells_per_step: 64}", "train.cells_per_step"),
        ("train: {hold_out: {share: 1}}", "train.hold_out.share"),
        ("train: {balance: {factors: {lung: -1}}}", "train.balance.factors.lung"),
        ("train: {learning_rate: .inf}", "train.learning_rate"),
        ("train: {mode: hide, asked_shares: [0]}", "asks for nothing"),
        ("train: {asked_shares: [0]}", "asks for nothing"),
        ("objectives: {a: {kind: gep}, b: {kind: gep, loss: ce}}", "more than one objective of the kind gep"),
        ("model: {width: 30, n_heads: 4}", "multiple of n_heads"),
        ("train: {asked_shares: [0.5, 1.5]}", "asked_shares.1"),
        ("objectives: {}", "objectives"),
        ("objectives: {gep: {kind: gpe}}", "gpe"),
        ("train: [", "is not YAML"),
        ("just words", "recipe.yaml"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(text, named):
    with pytest.raises(InputError, match=r"recipe\.yaml") as error:
        PretrainConfig.from_yaml(text, where="recipe.yaml")
    assert named in str(error.value)


@pytest.mark.parametrize("devices", [0, -1, "all"])
def test_devices_are_one_at_least_or_all_there_are(devices):
    with pytest.raises(InputError, match="devices"):
        Machine.read({"devices": devices}, where="the command")
    assert Machine.read({"devices": 2}, where="the command").devices == 2


def test_precision_may_be_the_number_that_yaml_reads():
    assert TrainConfig(precision=32).precision == TrainConfig(precision="32").precision == "32"
    with pytest.raises(ValueError, match="precision"):
        TrainConfig(precision=16)
