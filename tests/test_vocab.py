from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annformer.errors import InputError
from annformer.vocab import SPECIAL_TOKENS, GeneVocab, is_special


def written(tmp_path, text):
    path = tmp_path / "vocab.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_are_positions():
    vocab = GeneVocab(["CD3D", "<cls>", "ACTB"])
    assert vocab["ACTB"] == 2
    assert vocab.ids(["ACTB", "unknown", "CD3D", "cd3d"]).tolist() == [2, -1, 0, -1]
    assert vocab.ids([]).dtype == np.int64
    assert "CD3D" in vocab
    assert "cd3d" not in vocab
    assert len(vocab) == 3
    assert list(vocab) == ["CD3D", "<cls>", "ACTB"]
    with pytest.raises(KeyError):
        vocab["unknown"]


def test_special_tokens_are_no_genes():
    vocab = GeneVocab(["CD3D", "<cls>", "ACTB"])
    assert vocab.genes == ("CD3D", "ACTB")
    assert vocab.is_gene.tolist() == [True, False, True]
    assert vocab.cls_id == 1
    with pytest.raises(ValueError, match="read-only"):
        vocab.is_gene[1] = True
    with pytest.raises(InputError, match=r"no <pad>.*\n.*\n.*with_specials"):
        _ = vocab.pad_id


def test_with_specials_appends_the_missing_ones_in_order():
    full = GeneVocab(["CD3D", "<cls>", "ACTB"]).with_specials()
    assert full.tokens == ("CD3D", "<cls>", "ACTB", "<pad>", "<eoc>")
    assert full.with_specials() is full
    assert GeneVocab(["A"]).with_specials().tokens[1:] == SPECIAL_TOKENS


@pytest.mark.parametrize("tokens", [["A", "B", "A"], ["A", ""]])
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(InputError, match=r"more than once: A|token 1 .* is empty"):
        GeneVocab(tokens)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True), st.randoms(use_true_random=False))
def test_json_round_trip_in_any_order(tmp_path_factory, tokens, random):
    path = tmp_path_factory.mktemp("vocab") / "vocab.json"
    vocab = GeneVocab(tokens)
    vocab.to_json(path)
    assert GeneVocab.from_json(path) == vocab
    pairs = list(json.loads(path.read_text(encoding="utf-8")).items())
    random.shuffle(pairs)
    path.write_text(json.dumps(dict(pairs)), encoding="utf-8")
    assert GeneVocab.from_json(path).tokens == tuple(tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"A": 0, "B": 2}', r"1 ids are missing: 1; 1 lie outside: 2"),
        ('{"A": 0, "B": 0}', r"'A' and 'B' are both 0"),
        ('{"A": 0, "A": 1}', r"more than once: A"),
        ('{"A": 0, "B": -1}', r"lie outside: -1"),
        ('{"A": 0, "B": "1"}', r"no whole numbers: 'B': '1'"),
        ('{"A": 0, "B": 1.0}', r"no whole numbers: 'B': 1.0"),
        ('{"A": 0, "B": true}', r"no whole numbers: 'B': True"),
        ('{"A": 0, "B": null}', r"no whole numbers: 'B': None"),
        ('{"genes": {"A": 0}}', r"no whole numbers"),
        ('["A", "B"]', r"no object from token to id"),
        ("7", r"no object from token to id"),
        ("A,B", r"is not JSON"),
    ],
)
def test_a_vocabulary_is_read_strictly(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        GeneVocab.from_json(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*vocab\.json"):
        GeneVocab.from_json(tmp_path / "vocab.json")


def test_equal_vocabularies_are_one_key_also_after_pickling():
    vocab, same, other = GeneVocab(["A", "B"]), GeneVocab(["A", "B"]), GeneVocab(["B", "A"])
    assert vocab == same
    assert vocab != other
    assert vocab != ("A", "B")
    copy = pickle.loads(pickle.dumps(vocab))
    assert len({vocab: 1, same: 2, copy: 3}) == 1
    assert copy["B"] == 1


def test_untrained_genes_keep_their_ids_and_are_part_of_the_vocabulary():
    plain = GeneVocab(["A", "B", "C"]).with_specials()
    vocab = GeneVocab(["A", "B", "C"], untrained=["C", "A"]).with_specials()
    assert vocab.untrained == {"A", "C"}
    assert vocab.is_trained.tolist() == [False, True, False, True, True, True]
    assert vocab.ids(["A", "B"]).tolist() == [0, 1]
    assert vocab.genes == plain.genes
    assert vocab != plain
    assert hash(vocab) != hash(plain)
    assert vocab.all_trained() == plain
    assert plain.all_trained() is plain
    assert plain.is_trained.all()
    assert "3 genes, 2 of them untrained, 3 special" in repr(vocab)
    copy = pickle.loads(pickle.dumps(vocab))
    assert (copy, hash(copy)) == (vocab, hash(vocab))
    with pytest.raises(ValueError, match="read-only"):
        vocab.is_trained[0] = True


@pytest.mark.parametrize("name", ["D", "<cls>"])
def test_only_genes_of_the_vocabulary_can_be_untrained(name):
    with pytest.raises(InputError, match=rf"1 of the 2 untrained genes are no genes of the vocabulary: {name}"):
        GeneVocab(["A", "<cls>"], ["A", name])


def test_the_file_does_not_say_what_is_untrained(tmp_path):
    vocab = GeneVocab(["A", "B"], ["B"])
    vocab.to_json(tmp_path / "vocab.json")
    assert GeneVocab.from_json(tmp_path / "vocab.json") == vocab.all_trained()
    assert GeneVocab.from_json(tmp_path / "vocab.json", vocab.untrained) == vocab


def test_only_angle_brackets_make_a_special_token():
    assert is_special("<cls>")
    assert not is_special("<cls")
    assert not is_special("CD3D")
