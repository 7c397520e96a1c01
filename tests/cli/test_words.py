from __future__ import annotations

from typing import Literal

import pytest

from annformer.cli._words import arguments
from annformer.errors import InputError


def command(
    file: str, *, out: str, gene_key: str | None = None, empty: Literal["nan", "drop"] = "nan", resume: bool = False, size: int = 3
):
    """Do it.

    Parameters
    ----------
    file
        What to read.
    out
        What to write.
    """


def parse(*words: str):
    return arguments("work", command, list(words))


def test_words_and_options():
    expected = {"file": "in", "out": "to", "gene_key": "sym", "empty": "drop", "resume": False, "size": -4}
    assert parse("in", "--out", "to", "--gene_key", "sym", "--empty=drop", "--size", "-4") == expected


def test_dashes_are_underscores_only_in_names():
    assert parse("in-file", "--out=to-there", "--gene-key", "a-b")["gene_key"] == "a-b"
    assert parse("in-file", "--out=to-there")["out"] == "to-there"


@pytest.mark.parametrize(
    ("words", "resume"), [(["--resume"], True), (["--resume", "false"], False), (["--resume=true"], True), ([], False)]
)
def test_a_flag_needs_no_value(words, resume):
    assert parse("in", "--out", "to", *words)["resume"] is resume


def test_recipe_fills_in_and_typed_words_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("file: in\nout: to\ngene_key: symbol\nsize: 7\n")
    values = parse("--config", str(recipe), "--size", "9")
    assert values == {"file": "in", "out": "to", "gene_key": "symbol", "empty": "nan", "resume": False, "size": 9}


def test_help_is_printed_and_runs_nothing(capsys):
    assert parse("--help") is None
    out = capsys.readouterr().out
    assert "Do it." in out
    assert "What to write." in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in"], "--out"),
        ([], "FILE"),
        (["in", "--out", "to", "--gene_kei", "x"], "did you mean --gene_key"),
        (["in", "--out", "to", "--size", "many"], "--size"),
        (["in", "--out", "to", "--empty", "keep"], "keep"),
        (["in", "--out", "to", "extra"], "extra"),
        (["in", "--out", "to", "--gene", "x"], "--gene"),
    ],
)
def test_wrong_words(words, said):
    with pytest.raises(InputError, match=said) as caught:
        parse(*words)
    assert "what to do" in str(caught.value)
