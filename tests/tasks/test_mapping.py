"""ReferenceMapper: labels, shares, distances, novelty; saved, grown, refused."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import annformer as af
from annformer.data.write_columns import ALWAYS
from annformer.tasks import _encoding, _reference

KEY = "mapped_cell_type"
pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2")


@pytest.fixture(scope="module")
def reference(tiny_adata):
    adata = tiny_adata(90, seed=1)
    adata.obs_names = [f"ref{i}" for i in range(90)]
    return adata


@pytest.fixture
def query(tiny_adata):
    return tiny_adata(90, seed=1)[20:60].copy()  # cells of the reference, under other names


@pytest.fixture
def mapper(reference, tiny_model):
    return af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5, threads=1).fit(reference)


def embedded(adata, model) -> np.ndarray:
    return af.embed(adata, model, copy=True).obsm["X_annformer"]


def test_labels_are_those_of_the_nearest_cells(mapper, reference, query, tiny_model):
    result = mapper.predict(query, copy=True)
    similarities = embedded(query, tiny_model) @ embedded(reference, tiny_model).T
    nearest = np.argsort(-similarities, axis=1)[:, :5]
    labels = reference.obs["cell_type"].to_numpy()[nearest]
    for i, (row, names) in enumerate(zip(result.obs.itertuples(), labels, strict=True)):
        counts = pd.Series(names).value_counts()
        assert counts[row.mapped_cell_type] == counts.max()
        assert row.mapped_cell_type_share == pytest.approx(counts.max() / 5)
        assert row.mapped_cell_type_distance == pytest.approx(1 - similarities[i, nearest[i]].mean(), abs=1e-5)
        assert 0 <= row.mapped_cell_type_novelty <= 1
    assert KEY not in query.obs
    assert result.obs[KEY].dtype == "category"


def test_neighbours_have_names_and_begin_with_the_cell_itself(mapper, query):
    names, distances = mapper.neighbours(query)
    assert names[:, 0].tolist() == [f"ref{i}" for i in range(20, 60)]
    assert names.shape == distances.shape == (40, 5)
    assert np.abs(distances[:, 0]).max() < 1e-5
    assert (np.diff(distances, axis=1) >= 0).all()


def test_what_is_written(mapper, query):
    before = query.copy()
    assert mapper.predict(query, key_added="type") is None
    assert set(query.obs) - set(before.obs) == {"type", "type_share", "type_distance", "type_novelty"}
    assert {f"type{end}" for end in ALWAYS["mapping"]} == set(query.obs) - set(before.obs), "what goes when the cells are mapped again"
    record = query.uns["annformer"]["type"]
    assert record["task"] == "mapping"
    assert (record["n_neighbours"], record["n_cells"], record["search"], record["label_key"]) == (5, 90, "exact", "cell_type")
    assert list(query.obsm) == list(before.obsm)
    assert np.array_equal(query.X.toarray(), before.X.toarray())


def test_cells_above_a_novelty_are_unassigned(mapper, query, tiny_adata, caplog):
    mapper.predict(query, unassigned_above=1.0)
    assert "unassigned" not in set(query.obs[KEY])
    foreign = tiny_adata(40, seed=9)
    foreign.X = csr_matrix(foreign.X.toarray()[:, ::-1])  # the counts of other genes
    mapper.predict(foreign, unassigned_above=0.9)
    novel = foreign.obs[f"{KEY}_novelty"] > 0.9
    assert novel.any()
    assert np.array_equal(foreign.obs[KEY] == "unassigned", novel)
    assert foreign.obs[f"{KEY}_share"].notna().all()
    assert foreign.uns["annformer"][KEY]["unassigned_above"] == 0.9
    assert "get no label" not in caplog.text
    mapper.predict(foreign, unassigned_above=0.0)  # the limit of a user who has not looked at the novelty
    assert f"{(foreign.obs[KEY] == 'unassigned').sum()} of 40 cells have a novelty above 0 and get no label" in caplog.text


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_novelty_that_is_no_share_is_refused(mapper, query, share):
    with pytest.raises(af.InputError, match="unassigned_above"):
        mapper.predict(query, unassigned_above=share)


def test_cells_without_labels_are_left_out_with_a_note(reference, tiny_model, caplog):
    adata = reference.copy()
    labels = adata.obs["cell_type"].astype(object).to_numpy()
    labels[[0, 1, 2, 3]] = [None, "unknown", "unlabelled", "unassigned"]
    adata.obs["cell_type"] = labels
    with caplog.at_level(logging.INFO, "annformer"):
        mapper = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5).fit(adata)
    assert mapper.n_cells_ == 86
    assert mapper.classes_ == ("B cell", "T cell", "monocyte")
    assert any("4 of 90 cells have no label" in line for line in caplog.messages)
    assert not np.isin(mapper.neighbours(adata).names, ["ref0", "ref1", "ref2", "ref3"]).any()


@pytest.mark.filterwarnings("ignore::annformer.errors.AnnformerWarning")
def test_cells_without_known_genes(reference, query, tiny_model):
    blank = reference.copy()
    dense = blank.X.toarray()
    dense[[5, 6]] = 0
    blank.X = csr_matrix(dense)
    mapper = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5).fit(blank)
    assert mapper.n_cells_ == 88
    mapper.predict(blank)
    assert (blank.obs[KEY] == "unassigned").to_numpy().nonzero()[0].tolist() == [5, 6]
    assert blank.obs[f"{KEY}_share"].isna().sum() == 2
    names, distances = mapper.neighbours(blank)
    assert pd.isna(names[5]).all()
    assert np.isnan(distances[5]).all()


def test_one_label_is_a_warning(reference, tiny_model):
    reference = reference.copy()
    reference.obs["kind"] = "T"
    with pytest.warns(af.AnnformerWarning, match="one label only, 'T'"):
        af.ReferenceMapper(tiny_model, label_key="kind").fit(reference)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_key": "celltype"}, "no column 'celltype'"),
        ({"label_key": "none"}, "holds no label"),
        ({"label_key": "own"}, "90 labels for 90 cells"),
        ({"label_key": "cell_type", "n_neighbours": 90}, "90 labelled cells for 90 neighbours"),
        ({"label_key": "cell_type", "n_neighbours": 0}, "n_neighbours=0"),
        ({"label_key": "cell_type", "search": "annoy"}, "search='annoy'"),
    ],
)
def test_what_a_reference_cannot_be(reference, tiny_model, options, words):
    reference = reference.copy()
    reference.obs["none"], reference.obs["own"] = "unknown", reference.obs_names
    with pytest.raises(af.InputError, match=words):
        af.ReferenceMapper(tiny_model, **options).fit(reference)


def test_saved_and_loaded(mapper, query, tmp_path):
    mapper.save(tmp_path / "index")
    again = af.ReferenceMapper.load(tmp_path / "index", threads=1)
    assert (again.classes_, again.n_cells_, again.label_key) == (mapper.classes_, 90, "cell_type")
    expected, found = mapper.predict(query, copy=True).obs, again.predict(query, copy=True).obs
    pd.testing.assert_frame_equal(expected, found, atol=1e-5)


def test_another_model_in_the_index_is_refused(mapper, tmp_path, tiny_model):
    import torch

    mapper.save(tmp_path / "index")
    with torch.no_grad():
        tiny_model.encoder.layers[0].ff_in.bias += 0.1
    tiny_model.save_pretrained(tmp_path / "index" / "model")
    with pytest.raises(af.InputError, match="is not the one by which the reference was embedded"):
        af.ReferenceMapper.load(tmp_path / "index")


def test_more_cells_are_added(mapper, tiny_adata, reference, tiny_model):
    more = tiny_adata(30, seed=4)
    more.obs_names = [f"more{i}" for i in range(30)]
    more.obs["cell_type"] = "platelet"
    assert mapper.add(more) is mapper
    assert mapper.n_cells_ == 120
    assert mapper.classes_ == ("B cell", "T cell", "monocyte", "platelet")
    assert mapper.neighbours(more).names[:, 0].tolist() == more.obs_names.tolist()
    assert mapper.neighbours(reference).names[:, 0].tolist() == reference.obs_names.tolist()
    both = anndata.concat([reference, more])
    at_once = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5, threads=1).fit(both)
    new = tiny_adata(20, seed=5)
    assert np.array_equal(mapper.neighbours(new).names, at_once.neighbours(new).names)
    pd.testing.assert_frame_equal(mapper.predict(new, copy=True).obs, at_once.predict(new, copy=True).obs, atol=1e-5)


def test_cells_that_are_in_the_reference_are_not_added_again(mapper, reference, tmp_path):
    mapper.save(tmp_path / "index")
    again = af.ReferenceMapper.load(tmp_path / "index", threads=1)
    other = reference[::-2, ::-1].copy()  # other names, genes in another order
    other.obs_names = [f"other{i}" for i in range(other.n_obs)]
    for one in (mapper, again):
        for same in (reference, other):
            with pytest.raises(af.InputError, match="in the reference already, with the same counts"):
                one.add(same)
        assert one.n_cells_ == 90


def test_shallow_cells_that_look_alike_are_not_taken_for_the_same(reference, tiny_model):
    counts = np.zeros((40, reference.n_vars), np.float32)
    counts[np.arange(40), np.arange(40) % 5] = counts[:, 9] = 1
    shallow = anndata.AnnData(csr_matrix(counts), obs=reference.obs[:40], var=reference.var)
    mapper = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5, threads=1).fit(shallow[:20].copy())
    mapper.add(shallow[20:].copy())
    assert mapper.n_cells_ == 40


def test_of_cells_that_are_partly_there_the_others_are_added(mapper, reference, tiny_adata, caplog):
    new = tiny_adata(30, seed=4)
    new.obs_names = [f"new{i}" for i in range(30)]
    both = anndata.concat([reference[:50], new])
    blank = both.X.toarray()
    blank[60] = 0  # has no embedding, and is equal to nothing
    both.X = csr_matrix(blank)
    before = mapper._index.genes
    with pytest.warns(af.AnnformerWarning, match="1 cells express no gene"):
        mapper.add(both)
    assert "50 of 79 labelled cells of AnnData are in the reference already and are left out" in caplog.text
    assert mapper.n_cells_ == 119
    assert mapper._index.settings.studies[-1].model_dump() == {"name": "AnnData", "n_cells": 29, "n_left_out": 51}
    assert sum(mapper._index.genes.values()) == sum(before.values()) + int((blank[50:, both.var_names.isin(list(before))] > 0).sum())
    assert mapper.neighbours(new[:3].copy()).names[:, 0].tolist() == ["new0", "new1", "new2"]
    with pytest.raises(af.InputError, match="all 79 labelled cells"):
        mapper.add(both)


def test_cells_that_occur_twice_in_one_reference_are_told(reference, tiny_model, caplog):
    twice = anndata.concat([reference, reference[:7]], index_unique="-")
    mapper = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5, threads=1).fit(twice)
    assert mapper.n_cells_ == 97
    assert "7 cells of AnnData have the same counts as another cell there" in caplog.text


def test_an_embedding_at_hand_is_used(reference, query, tiny_model, mapper, monkeypatch):
    expected = mapper.predict(query, copy=True).obs
    for adata in (reference, query):
        af.embed(adata, tiny_model, key_added="X_mine")
    monkeypatch.setattr(_encoding, "encode_cells", lambda *_, **__: pytest.fail("embedded again"))
    again = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5, threads=1).fit(reference, embedding="X_mine")
    pd.testing.assert_frame_equal(again.predict(query, embedding="X_mine", copy=True).obs, expected, atol=1e-5)
    del reference.obsm["X_mine"], reference.uns["annformer"]


def test_an_embedding_of_another_kind_is_refused(mapper, query, tiny_model):
    import torch

    af.embed(query, tiny_model, key_added="X_short", max_length=20)
    with pytest.raises(af.InputError, match=r"max_length 20.*\n.*max_length 1200"):
        mapper.predict(query, embedding="X_short")
    other = af.ScGPT(tiny_model.config, tiny_model.vocab)
    with torch.no_grad():
        other.load_state_dict({name: tensor * 1.1 for name, tensor in tiny_model.state_dict().items()})
    af.embed(query, other, key_added="X_other")
    with pytest.raises(af.InputError, match=rf"was made by .*{other.fingerprint[:8]}.*\n.*{tiny_model.fingerprint[:8]}"):
        mapper.predict(query, embedding="X_other")
    query.obsm["X_pca"] = np.zeros((40, 32), np.float32)
    for name in ("X_pca", "X_none"):
        with pytest.raises(af.InputError, match=name):
            mapper.predict(query, embedding=name)


def test_a_query_without_most_genes_of_the_reference_is_refused(mapper, query):
    total = np.asarray(query.X.sum(axis=0)).reshape(-1)
    loud = total > np.quantile(total, 0.6)
    with pytest.raises(af.InputError, match="of what its cells express"):
        mapper.predict(query[:, ~loud].copy())
    with pytest.warns(af.AnnformerWarning, match="of what its cells express"):
        mapper.predict(query[:, total > np.quantile(total, 0.4)].copy())
    mapper.predict(query[:, total > np.quantile(total, 0.05)].copy())  # genes that hardly any cell expresses do not matter


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_from_file_to_file(mapper, query, tmp_path, suffix):
    query.obs["note"] = "kept"
    query.write_h5ad(tmp_path / "in.h5ad")
    table = mapper.predict_file(tmp_path / "in.h5ad", tmp_path / f"out.{suffix}", progress=False)
    read = anndata.read_h5ad if suffix == "h5ad" else anndata.read_zarr
    written, expected = read(tmp_path / f"out.{suffix}"), mapper.predict(query, copy=True)
    pd.testing.assert_frame_equal(written.obs, expected.obs, check_dtype=suffix == "h5ad")
    pd.testing.assert_frame_equal(table, expected.obs[table.columns], check_names=False)
    assert written.uns["annformer"][KEY]["n_cells"] == 90
    assert np.array_equal(written.X.toarray(), query.X.toarray())
    assert {path.name for path in tmp_path.iterdir()} == {"in.h5ad", f"out.{suffix}"}


def test_columns_of_that_name_are_replaced_in_a_file(mapper, query, tmp_path):
    query.obs[KEY] = "old"
    query.write_h5ad(tmp_path / "in.h5ad")
    mapper.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", progress=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert "old" not in set(written[KEY])
    assert list(written.columns).count(KEY) == 1


def test_a_file_of_a_reference_is_read_as_the_cells_are(mapper, reference, query, tiny_model, tmp_path):
    af.embed(reference, tiny_model, copy=True).write_h5ad(tmp_path / "ref.h5ad")
    for embedding in (None, "X_annformer"):
        again = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5).fit(tmp_path / "ref.h5ad", embedding=embedding)
        assert np.array_equal(again.neighbours(query).names, mapper.neighbours(query).names)


def test_an_output_that_exists_is_kept(mapper, query, tmp_path):
    query.write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "out.h5ad").write_text("mine")
    with pytest.raises(af.InputError, match="exists already"):
        mapper.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    assert (tmp_path / "out.h5ad").read_text() == "mine"


def test_faiss_by_choice(reference, query, mapper, tiny_model):
    pytest.importorskip("faiss")
    listed = af.ReferenceMapper(tiny_model, label_key="cell_type", n_neighbours=5, search="faiss").fit(reference)
    assert np.array_equal(listed.neighbours(query).names[:, 0], mapper.neighbours(query).names[:, 0])


def test_long_searches_say_beforehand_what_they_take(mapper, query, monkeypatch, caplog):
    monkeypatch.setattr(_reference, "ESTIMATED_ABOVE", 100)
    with caplog.at_level(logging.INFO, "annformer"):
        mapper.predict(query)
    assert any("40 cells against 90: about" in line for line in caplog.messages)


def test_nothing_works_before_fit(tiny_model, query, tmp_path):
    mapper = af.ReferenceMapper(tiny_model, label_key="cell_type")
    for call in (lambda: mapper.predict(query), lambda: mapper.save(tmp_path / "x"), lambda: mapper.classes_, lambda: mapper.add(query)):
        with pytest.raises(af.InputError, match="not fitted"):
            call()
