from __future__ import annotations

from pathlib import Path

import pytest

from annformer.errors import InputError
from annformer.train.config import PretrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("pretrain-*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_and_gives_a_network(path, tiny_vocab):
    config = PretrainConfig.from_yaml(path.read_text(), where=path.name)
    assert config.network(tiny_vocab).vocab_size == len(tiny_vocab)
    assert set(config.objectives) >= {"gep", "gepc"}


def test_an_empty_recipe_is_the_published_pair_of_objectives():
    config = PretrainConfig.from_yaml("", where="nothing")
    assert config.objectives["gep"].model_dump()["cell_prompt"]
    assert config.train.asked_shares == (0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {epoch: 3}", "train.epoch"),
        ("model: {width: 30, n_heads: 4}", "multiple of n_heads"),
        ("train: {asked_shares: [0.5, 1.5]}", "asked_shares.1"),
        ("objectives: {}", "objectives"),
        ("objectives: {gep: {kind: gpe}}", "gpe"),
        ("train: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(text, named):
    with pytest.raises(InputError, match=r"recipe\.yaml") as error:
        PretrainConfig.from_yaml(text, where="recipe.yaml")
    assert named in str(error.value)
