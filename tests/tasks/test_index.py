"""The index of a reference: nearest vectors, what is on the disk, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from annformer.errors import InputError
from annformer.tasks import _index, _search
from annformer.tasks._index import IndexSettings, ReferenceIndex, Study, new_index
from annformer.tasks._search import build_lists, nearest, nearest_by_lists, seconds_to_compare, similarities_to, take
from annformer.tasks._votes import vote
from annformer.tokenizer import TokenizerSettings

STUDY = Study(name="blood", n_cells=40, n_left_out=2)


def unit(n: int, seed: int, width: int = 32, n_clusters: int = 12) -> np.ndarray:
    """Clustered vectors of length 1."""
    centres = np.random.default_rng(0).normal(size=(n_clusters, width))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(n_clusters, size=n)] + 0.5 * rng.normal(size=(n, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def keys(n: int) -> np.ndarray:
    """Of cells that are all different; their number is in the last bits of 64."""
    return np.arange(n, dtype=np.uint64) + np.uint64(2**63)


def brute(queries: np.ndarray, vectors: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    similarities = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :n]
    return order, np.take_along_axis(similarities, order, axis=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several products, blocks and chunks in few vectors."""
    for name, size in (("QUERIES", 7), ("ROWS", 33), ("ROWS_AT_ONCE", 99)):
        monkeypatch.setattr(_search, name, size)
    monkeypatch.setattr(_search.blocks, "__defaults__", (99,))


@pytest.mark.parametrize("cuts", [(), (150,), (1, 98, 299)])
def test_exact_search_finds_the_nearest(small_blocks, cuts):
    vectors, queries = unit(300, 1), unit(40, 2)
    seen: list[int] = []
    found = nearest(queries, np.split(vectors, cuts), 9, advance=seen.append)
    rows, similarities = brute(queries, vectors, 9)
    assert np.array_equal(found.rows, rows)
    assert np.allclose(found.similarities, similarities, atol=1e-6)
    assert sum(seen) == 300


def test_all_rows_may_be_asked_for(small_blocks):
    vectors = unit(20, 1)
    found = nearest(vectors[:3], (vectors,), 20)
    assert np.array_equal(np.sort(found.rows, axis=1), np.tile(np.arange(20), (3, 1)))
    assert found.rows[:, 0].tolist() == [0, 1, 2]


def test_the_estimate_grows_with_the_work(small_blocks):
    vectors = unit(400, 1)
    assert seconds_to_compare(vectors[:100], (vectors, vectors, vectors), 5) > 0


def test_take_and_similarities_go_over_parts():
    vectors, queries = unit(30, 1), unit(4, 2)
    parts = np.split(vectors, (11, 12))
    rows = np.array([[0, 29, 11], [10, 12, 5], [3, -1, 11], [-1, -1, -1]])
    assert np.array_equal(take(parts, rows[0]), vectors[rows[0]])
    found = similarities_to(queries, parts, rows)
    assert np.allclose(found[1], vectors[rows[1]] @ queries[1], atol=1e-6)
    assert np.isneginf(found[rows < 0]).all()
    assert np.isfinite(found[rows >= 0]).all()


def test_faiss_finds_nearly_all_and_gives_true_similarities():
    pytest.importorskip("faiss")
    vectors, queries = unit(4_000, 1), unit(200, 2)
    found = nearest_by_lists(queries, (vectors[:1_500], vectors[1_500:]), 10, build_lists((vectors,)))
    rows, _ = brute(queries, vectors, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found.rows, rows, strict=True)])
    assert recall >= 0.95
    assert np.allclose(found.similarities[0], vectors[found.rows[0]] @ queries[0], atol=1e-6)
    assert (np.diff(found.similarities, axis=1) <= 0).all()


def test_faiss_lists_with_too_few_vectors_are_made_up_for():
    pytest.importorskip("faiss")
    vectors = unit(400, 1)
    found = nearest_by_lists(vectors[:5], (vectors,), 300, build_lists((vectors,)))
    assert (found.rows >= 0).all()
    assert all(len(set(rows)) == 300 for rows in found.rows.tolist())


def test_votes_and_ties():
    codes = np.array([[0, 1, 1, 2], [2, 0, 0, 2], [2, 0, 0, 2], [1, 1, 1, 1]])
    near = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.5], [0.9, 0.8, 0.7, 0.65], [-0.5, -0.6, -0.7, -0.8]], np.float32)
    winners, share = vote(codes, near, 3)
    assert winners.tolist() == [1, 0, 2, 1]  # 0.8 + 0.7 > 0.9 + 0.5, and < 0.9 + 0.65
    assert share.tolist() == [0.5, 0.5, 0.5, 1.0]


def test_votes_of_many_cells_are_counted_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    codes, near = rng.integers(4, size=(50, 5)), rng.random((50, 5)).astype(np.float32)
    whole = vote(codes, near, 4)
    monkeypatch.setattr("annformer.tasks._votes.CELLS_AT_ONCE", 7)
    assert all(np.array_equal(a, b) for a, b in zip(whole, vote(codes, near, 4), strict=True))


@pytest.fixture
def index(tiny_model) -> ReferenceIndex:
    settings = IndexSettings(
        model="tiny",
        fingerprint=tiny_model.fingerprint,
        tokenizer=TokenizerSettings(),
        label_key="cell_type",
        n_neighbours=5,
        search="exact",
        version="0",
        studies=(),
    )
    labels = np.array(["T cell", "B cell"])[np.arange(40) % 2]
    return new_index(settings, 32).with_cells(unit(40, 1), [f"cell{i}" for i in range(40)], labels, keys(40), {"CD3D": 20, "LYZ": 3}, STUDY)


def test_classes_are_sorted_and_new_ones_come_after(index):
    assert index.classes == ("B cell", "T cell")
    larger = index.with_cells(unit(3, 2), ["a", "b", "c"], ["monocyte", "T cell", "A cell"], keys(3), {"LYZ": 3, "FTL": 1}, STUDY)
    assert larger.classes == ("B cell", "T cell", "A cell", "monocyte")
    assert [larger.classes[i] for i in larger.codes[-3:]] == ["monocyte", "T cell", "A cell"]
    assert dict(larger.genes) == {"CD3D": 20, "LYZ": 6, "FTL": 1}
    assert [study.n_cells for study in larger.settings.studies] == [40, 40]
    assert index.n_cells == 40


def test_novelty_is_the_place_among_the_distances_of_the_reference(index):
    similarities = np.sort(unit(40, 1) @ unit(40, 1).T, axis=1)[:, ::-1]
    own = np.sort((1 - similarities[:, 1:6]).mean(axis=1))
    assert np.allclose(index.spacing, own, atol=1e-6)
    assert index.percentile(np.array([-1.0, 3.0])).tolist() == [0.0, 1.0]
    assert abs(float(index.percentile(np.array([(own[19] + own[20]) / 2]))[0]) - 0.5) < 1e-6


def test_identical_cells_do_not_count_themselves(index):
    same = np.tile(unit(1, 1), (20, 1))
    doubled = index.with_cells(same, ["x"] * 20, ["T cell"] * 20, keys(20), {}, STUDY)
    assert (doubled.spacing[:20] < 1e-6).all()
    assert len(doubled.spacing) == 60


def test_saved_and_opened(index, tiny_model, tmp_path):
    index.save(tmp_path / "index", tiny_model)
    opened = ReferenceIndex.open(tmp_path / "index")
    assert isinstance(opened.parts[0], np.memmap)
    assert opened.settings == index.settings
    assert opened.classes == index.classes
    assert dict(opened.genes) == dict(index.genes)
    for name in ("codes", "spacing", "keys"):
        assert np.array_equal(getattr(opened, name), getattr(index, name))
    assert opened.names.to_pylist() == index.names.to_pylist()
    query = unit(4, 3)
    assert np.array_equal(opened.nearest(query, 5).rows, index.nearest(query, 5).rows)
    assert not [path for path in (tmp_path / "index").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]


def test_an_opened_index_grows_over_itself(index, tiny_model, tmp_path):
    index.save(tmp_path / "index", tiny_model)
    opened = ReferenceIndex.open(tmp_path / "index")
    larger = opened.with_cells(unit(3, 2), ["a", "b", "c"], ["T cell"] * 3, keys(3), {}, STUDY)
    larger.save(tmp_path / "index", tiny_model)
    again = ReferenceIndex.open(tmp_path / "index")
    assert np.array_equal(again.parts[0], np.concatenate([index.parts[1], unit(3, 2)]))
    assert again.names.to_pylist()[-3:] == ["a", "b", "c"]
    assert again.keys.tolist() == [*keys(40).tolist(), *keys(3).tolist()]


def test_faiss_is_saved_and_opened(index, tiny_model, tmp_path):
    pytest.importorskip("faiss")
    settings = index.settings.with_(search="faiss", studies=[])
    made = new_index(settings, 32).with_cells(unit(500, 1), ["c"] * 500, ["T cell"] * 500, keys(500), {}, STUDY)
    made.save(tmp_path / "index", tiny_model)
    opened = ReferenceIndex.open(tmp_path / "index")
    query = unit(4, 3)
    assert np.array_equal(opened.nearest(query, 5).rows, made.nearest(query, 5).rows)
    assert opened.with_cells(unit(3, 2), ["a"] * 3, ["T cell"] * 3, keys(3), {}, STUDY).lists.ntotal == 503
    path = tmp_path / "index" / "lists.faiss"
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(InputError, match=r"another lists\.faiss"):
        ReferenceIndex.open(tmp_path / "index")
    path.write_bytes(bytes(len(content)))
    with pytest.raises(InputError, match=r"lists\.faiss that cannot be read"):
        ReferenceIndex.open(tmp_path / "index")


@pytest.mark.parametrize("name", ["vectors.npy", "cells.arrow", "genes.arrow", "spacing.npy"])
def test_a_damaged_file_is_named(index, tiny_model, tmp_path, name):
    index.save(tmp_path / "index", tiny_model)
    path = tmp_path / "index" / name
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(InputError, match=f"damaged: it has another {name}"):
        ReferenceIndex.open(tmp_path / "index")
    path.unlink()
    with pytest.raises(InputError, match=f"damaged: it lacks {name}"):
        ReferenceIndex.open(tmp_path / "index")


def test_a_changed_label_is_found(index, tiny_model, tmp_path):
    index.save(tmp_path / "index", tiny_model)
    path = tmp_path / "index" / "cells.arrow"
    path.write_bytes(path.read_bytes().replace(b"T cell", b"X cell"))
    with pytest.raises(InputError, match=r"another cells\.arrow"):
        ReferenceIndex.open(tmp_path / "index")


def test_what_is_no_index_is_said(index, tiny_model, tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        ReferenceIndex.open(tmp_path / "nowhere")
    tiny_model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"it holds README\.md, config\.json"):
        ReferenceIndex.open(tmp_path / "model")
    index.save(tmp_path / "index", tiny_model)
    path = tmp_path / "index" / "index.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 7'))
    with pytest.raises(InputError, match="format 7"):
        ReferenceIndex.open(tmp_path / "index")


def test_a_failed_save_leaves_what_was_there(index, tiny_model, tmp_path, monkeypatch):
    index.save(tmp_path / "index", tiny_model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir() if path.is_file()}

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_index, "_write_table", full)
    with pytest.raises(InputError, match="No space left"):
        index.save(tmp_path / "index", tiny_model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_other_files_are_never_replaced(index, tiny_model, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        index.save(tmp_path / "index", tiny_model)
