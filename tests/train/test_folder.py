"""What a run's folder takes, and what it refuses, without any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from annformer.data.store import StoreSource
from annformer.errors import InputError
from annformer.train import folder as folder_module
from annformer.train.config import PretrainConfig
from annformer.train.folder import RunFolder
from annformer.vocab import GeneVocab


@pytest.fixture
def run(tiny_store, tmp_path):
    """Maker of the folder's keeper; recipes differ by what is given."""

    def make(path: Path = tmp_path / "run", vocab: GeneVocab | None = None, **train) -> RunFolder:
        source = StoreSource(tiny_store)
        return RunFolder(path, PretrainConfig.read({"train": train}, where="test"), source, vocab or source.vocab)

    return make


@pytest.fixture
def begun(run, tmp_path) -> Path:
    with run().held():
        (tmp_path / "run" / "log.csv").write_text("step,loss\n")
    return tmp_path / "run"


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(run: RunFolder, *words: str, **options) -> None:
    before = sorted(run.path.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        run.check(**options)
    for word in words:
        assert word in str(error.value)
    assert sorted(run.path.parent.rglob("*")) == before


def test_looking_writes_nothing_and_beginning_says_what_the_run_is(run, tmp_path):
    run().check()
    assert list(tmp_path.iterdir()) == []
    with run(seed=7).held():
        assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["train"]["seed"] == 7
    config = PretrainConfig.from_yaml((tmp_path / "run" / "recipe.yaml").read_text(), where="recipe")
    assert config == run(seed=7).config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["recipe.yaml", "run.json"]


def test_the_same_run_goes_on_and_what_a_kill_left_half_written_goes(run, begun):
    (begun / ".run.json.partial").write_text("{")
    (begun / ".model.abc.partial").mkdir()
    (begun / "recipe.yaml").unlink()  # killed between the two files
    with run().held():
        assert sorted(path.name for path in begun.iterdir()) == ["log.csv", "recipe.yaml", "run.json"]


def test_settings_that_do_not_decide_the_weights_may_change(run, begun):
    run(workers=3, checkpoint_steps=7, validations=2, hold_out={"n_cells": 9}).check()


def test_another_recipe_is_refused_naming_what_differs(run, begun):
    refused(run(seed=7, workers=3, learning_rate=0.5), "train.seed: 0 there, 7 here", "train.learning_rate: 0.001 there, 0.5 here")
    with pytest.raises(InputError) as error:
        run(seed=7, workers=3).check()
    assert "workers" not in str(error.value)


def test_other_cells_are_refused(run, begun):
    edit(begun / "run.json", lambda values: values["cells"].update(n=99, shards=["0" * 64]))
    refused(run(), "cells.n: 99 there, 100 here", "cells.shards")


def test_turns_decide_what_dropout_hides(run, begun):
    refused(run(tokens_per_forward=9_999), "train.tokens_per_forward: 32768 there, 9999 here")


def test_another_vocabulary_of_the_same_length_is_refused(run, begun, tiny_store):
    own = StoreSource(tiny_store).vocab
    refused(run(vocab=GeneVocab([*own.tokens[1::-1], *own.tokens[2:]])), "cells.vocab")


def test_a_run_from_before_the_vocabulary_was_noted_goes_on(run, begun):
    edit(begun / "run.json", lambda values: values["cells"].pop("vocab"))
    run().check()


def test_a_finished_run_is_refused(run, begun):
    (begun / "model").mkdir()
    refused(run(), "is finished", str(begun / "model"), "--overwrite")


def test_a_run_from_before_a_setting_existed_goes_on_when_the_default_is_asked_for(run, begun):
    edit(begun / "run.json", lambda values: values["recipe"]["train"].pop("gene_init"))
    run().check()
    refused(run(gene_init="svd"), 'train.gene_init: "random" there, "svd" here')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("run.json is damaged", "not JSON")),
        ("[]", ("run.json does not describe a run",)),
        ('{"format": 2}', ("run.json does not describe a run in format 1",)),
        ('{"format": 1, "annformer": "9.9", "cells": {}, "recipe": {"colour": 1}}', ("does not read", "9.9")),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(run, begun, text, words):
    (begun / "run.json").write_text(text)
    refused(run(), *words, "--overwrite")
    run().check(overwrite=True)


def test_a_folder_of_something_else_is_refused_even_to_be_overwritten(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refused(run(), "thesis.txt", "which no run wrote")
    refused(run(), "thesis.txt", "which no run wrote", overwrite=True)


def test_a_file_in_the_way_is_refused(run, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(run(), "is a file")


def test_what_a_user_put_into_a_run_does_not_stop_it_but_is_never_overwritten(run, begun):
    (begun / "notes.txt").write_text("mine")
    run().check()
    refused(run(), "notes.txt", overwrite=True)


def test_overwriting_leaves_nothing_of_the_run_before(run, begun):
    (begun / "model").mkdir()
    (begun / "checkpoints").mkdir()
    (begun / ".DS_Store").write_text("of the system")
    with run(seed=7).held(overwrite=True):
        assert sorted(path.name for path in begun.iterdir()) == [".DS_Store", "recipe.yaml", "run.json"]
        assert json.loads((begun / "run.json").read_text())["recipe"]["train"]["seed"] == 7


def test_two_at_once_are_refused(run, monkeypatch):
    monkeypatch.setattr(folder_module, "_PATIENCE", 0)
    with run().held(), pytest.raises(InputError, match="another run is writing"), run().held():
        pass
    with run().held():
        pass
