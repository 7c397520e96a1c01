from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import annformer as af
from annformer import inference
from annformer.cli._messages import explain
from annformer.data import write
from annformer.tasks import _encoding, _output, embedding

KEY = "X_annformer"
pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Many runs and flushes in a small file."""
    monkeypatch.setattr(inference, "CELLS_PER_READ", 8)
    monkeypatch.setattr(embedding, "FLUSH_EVERY", 16)


@pytest.fixture
def rich_adata(tiny_adata):
    """Cells with every kind of element; two of them express nothing."""
    adata = tiny_adata()
    counts = sp.csr_matrix(adata.X.toarray() * ~np.isin(np.arange(60), [5, 40])[:, None])
    adata.X = sp.csr_matrix(np.log1p(counts.toarray()).astype(np.float32))
    adata.layers["counts"] = sp.csc_matrix(counts)
    adata.layers["dense"] = counts.toarray()
    adata.raw = adata.copy()
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(60, 3))
    adata.obsp["distances"] = sp.csr_matrix(np.eye(60))
    adata.varm["loadings"] = np.ones((adata.n_vars, 2))
    adata.uns["note"] = {"who": "me", "n": 3}
    return adata


@pytest.fixture
def path_in(tiny_adata, tmp_path):
    path = tmp_path / "in.h5ad"
    tiny_adata().write_h5ad(path)
    return path


def embed_file(path_in, path_out, model, **options):
    return af.embed_file(path_in, path_out, model=model, progress=False, **options)


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, n_runs, error=StoppedError):
    """Let `embed_file` fail after some runs of cells."""
    whole = _encoding.encode_cells

    def stopping(*args, **options):
        for number, run in enumerate(whole(*args, **options)):
            if number == n_runs:
                raise error
            yield run

    monkeypatch.setattr(_encoding, "encode_cells", stopping)


# in memory


def test_embed_writes_its_two_fields_and_nothing_else(tiny_adata, tiny_model):
    adata, untouched = tiny_adata(), tiny_adata()
    assert af.embed(adata, tiny_model) is None
    rows = adata.obsm.pop(KEY)
    record = adata.uns.pop("annformer")
    assert rows.shape == (60, 32)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert list(record) == [KEY]
    assert not adata.uns
    assert not adata.obsm
    assert adata.obs.equals(untouched.obs)
    assert adata.var.equals(untouched.var)
    assert (adata.X != untouched.X).nnz == 0


def test_record_survives_writing(tiny_adata, tiny_model, tmp_path):
    adata = tiny_adata()
    adata.var_names = [*adata.var_names[:-2], "HLA-A/B", adata.var_names[0] + ".1"]
    af.embed(adata, tiny_model, max_length=50, seed=3)
    adata.write_h5ad(tmp_path / "x.h5ad")
    record = anndata.read_h5ad(tmp_path / "x.h5ad").uns["annformer"][KEY]
    assert record["model"] == tiny_model.name
    assert record["fingerprint"] == tiny_model.fingerprint
    assert record["settings"]["max_length"] == 50
    assert record["settings"]["seed"] == 3
    assert record["counts"]["where"] == "X"
    assert record["genes"]["n_matched"] >= 290
    assert record["version"] == af.__version__


def test_two_embeddings_stand_side_by_side(tiny_adata, tiny_model):
    adata = tiny_adata()
    af.embed(adata, tiny_model, key_added="X_long")
    af.embed(adata, tiny_model, key_added="X_short", max_length=30)
    assert set(adata.obsm) == set(adata.uns["annformer"]) == {"X_long", "X_short"}
    assert np.abs(adata.obsm["X_long"] - adata.obsm["X_short"]).max() > 1e-3


def test_copy_leaves_the_original_alone(tiny_adata, tiny_model):
    adata = tiny_adata()
    copied = af.embed(adata, tiny_model, copy=True)
    assert KEY in copied.obsm
    assert KEY not in adata.obsm
    assert "annformer" not in adata.uns


def test_model_may_be_a_folder(tiny_adata, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    one, two = tiny_adata(), tiny_adata()
    af.embed(one, tiny_model)
    af.embed(two, tmp_path / "model")
    np.testing.assert_array_equal(one.obsm[KEY], two.obsm[KEY])


def test_layer_is_found_and_can_be_named(rich_adata, tiny_model):
    with pytest.warns(af.AnnformerWarning):
        af.embed(rich_adata, tiny_model, key_added="X_found")
    with pytest.warns(af.AnnformerWarning):
        af.embed(rich_adata, tiny_model, key_added="X_dense", layer="dense")
    assert rich_adata.uns["annformer"]["X_found"]["counts"]["where"] == "layers['counts']"
    np.testing.assert_allclose(rich_adata.obsm["X_found"], rich_adata.obsm["X_dense"], atol=1e-6)


def test_empty_cells_are_nan_with_a_warning_that_names_them(rich_adata, tiny_model):
    with pytest.warns(af.AnnformerWarning, match=r"2 cells have \(cell5, cell40\)") as caught:
        af.embed(rich_adata, tiny_model)
    assert len(caught) == 1
    assert np.flatnonzero(np.isnan(rich_adata.obsm[KEY]).all(axis=1)).tolist() == [5, 40]
    assert rich_adata.uns["annformer"][KEY]["n_empty"] == 2


def test_empty_cells_are_refused_or_dropped_by_choice(rich_adata, tiny_model):
    with pytest.raises(af.InputError, match="cell5"):
        af.embed(rich_adata, tiny_model, empty="error")
    with pytest.raises(af.InputError, match="copy=True"):
        af.embed(rich_adata, tiny_model, empty="drop")
    assert KEY not in rich_adata.obsm
    with pytest.warns(af.AnnformerWarning, match="left out"):
        kept = af.embed(rich_adata, tiny_model, empty="drop", copy=True)
    assert kept.n_obs == 58
    assert np.isfinite(kept.obsm[KEY]).all()


def test_only_empty_cells_are_refused(tiny_adata, tiny_model):
    adata = tiny_adata()
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    with pytest.raises(af.InputError, match="none of the 60 cells"):
        af.embed(adata, tiny_model)


@pytest.mark.parametrize(
    "options", [{"empty": "keep"}, {"workers": -1}, {"device": "gpu7"}, {"max_length": 1}, {"seed": -1}, {"gene_key": "symbol"}]
)
def test_wrong_options_are_refused(tiny_adata, tiny_model, options):
    adata = tiny_adata()
    with pytest.raises(af.InputError, match=next(iter(options))):
        af.embed(adata, tiny_model, **options)
    assert KEY not in adata.obsm


def test_model_that_needs_batch_labels_is_refused(tiny_adata, tiny_vocab):
    from annformer.scgpt import ModelFolderConfig

    network = af.ModelConfig(vocab_size=len(tiny_vocab), width=8, n_heads=2, n_layers=1, ff_width=8, input_norm="domain", n_batches=2)
    model = af.ScGPT(ModelFolderConfig(model=network), tiny_vocab)
    with pytest.raises(af.InputError, match="batch label"):
        af.embed(tiny_adata(), model)


def test_long_runs_say_beforehand_what_they_take(tiny_adata, tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(_encoding, "ESTIMATE_ABOVE", 50)
    with caplog.at_level(logging.INFO, "annformer"):
        af.embed(tiny_adata(), tiny_model)
    assert any("60 cells with" in line and "cells/s" in line for line in caplog.messages)


def test_progress_goes_to_stderr_by_choice(tiny_adata, tiny_model, capsys):
    af.embed(tiny_adata(), tiny_model, progress=False)
    assert capsys.readouterr() == ("", "")
    af.embed(tiny_adata(), tiny_model, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "60/60" in err


def test_what_cannot_be_written_into_is_refused_before_any_work(tiny_adata, tiny_model, path_in, monkeypatch):
    monkeypatch.setattr(_encoding, "encode_cells", lambda *_, **__: pytest.fail("the work had begun"))
    backed = anndata.read_h5ad(path_in, backed="r")
    for options in ({"adata": backed[:10]}, {"adata": backed[:10], "copy": True}, {"adata": backed, "copy": True}):
        with pytest.raises(af.InputError, match=r"to_memory\(\), or use embed_file or predict_file"):
            af.embed(model=tiny_model, **options)
    with pytest.raises(af.InputError, match="embed_file"):
        af.embed(path_in, tiny_model)
    foreign = tiny_adata()
    foreign.uns["annformer"] = "my own note"
    with pytest.raises(af.InputError, match="not a mapping"):
        af.embed(foreign, tiny_model)
    assert foreign.uns["annformer"] == "my own note"
    assert not foreign.obsm


def test_a_view_becomes_its_own_object_without_a_word(tiny_adata, tiny_model):
    whole = tiny_adata()
    view = whole[10:20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.embed(view, tiny_model)
    assert not view.is_view
    assert view.obsm[KEY].shape == (10, 32)
    assert KEY not in whole.obsm
    assert "annformer" not in whole.uns


def test_nothing_is_half_written_when_writing_fails(tiny_adata, tiny_model, monkeypatch):
    adata = tiny_adata()
    monkeypatch.setattr(embedding, "_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        af.embed(adata, tiny_model)
    assert not adata.obsm


def test_few_known_genes_are_a_warning(tiny_adata, tiny_model):
    adata = tiny_adata()
    adata.var_names = [name if number % 3 == 0 else f"locus{number}" for number, name in enumerate(adata.var_names)]
    with pytest.warns(af.AnnformerWarning, match=r"only 3\d% of the columns \(\d+\) are genes") as caught:
        af.embed(adata, tiny_model)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("change", "warned"), [(np.log1p, False), (lambda x: x * 1000.5, True), (lambda x: x / x.max(), True)])
def test_values_that_are_not_counts_are_a_warning(tiny_adata, tiny_model, change, warned):
    adata = tiny_adata()
    adata.X = sp.csr_matrix(change(adata.X.toarray()).astype(np.float32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        af.embed(adata, tiny_model)
    assert [str(warning.message).count("X is normalised, not counts: ") for warning in caught] == [1] * warned


# from file to file


def assert_equal_elements(found, expected):
    """All that `expected` has; X and layers by value."""
    assert found.obs.equals(expected.obs)
    assert found.var.equals(expected.var)
    for name in (None, *expected.layers):
        np.testing.assert_array_equal(dense(found, name), dense(expected, name))
    np.testing.assert_array_equal(found.raw.X.toarray(), expected.raw.X.toarray())
    np.testing.assert_array_equal(found.obsm["X_pca"], expected.obsm["X_pca"])
    np.testing.assert_array_equal(found.varm["loadings"], expected.varm["loadings"])
    np.testing.assert_array_equal(found.obsp["distances"].toarray(), expected.obsp["distances"].toarray())
    assert found.uns["note"]["n"] == 3


def dense(adata, layer):
    matrix = adata.X if layer is None else adata.layers[layer]
    return matrix.toarray() if sp.issparse(matrix) else matrix


@pytest.mark.parametrize("suffix_in", [".h5ad", ".zarr"])
@pytest.mark.parametrize("suffix_out", [".h5ad", ".zarr"])
@pytest.mark.parametrize("empty", ["nan", "drop"])
def test_file_has_everything_and_the_same_embedding(rich_adata, tiny_model, tmp_path, suffix_in, suffix_out, empty, monkeypatch):
    monkeypatch.setattr("annformer.data.write._BLOCK", 500)  # several blocks of every matrix
    path_in, path_out = tmp_path / f"in{suffix_in}", tmp_path / f"out{suffix_out}"
    (rich_adata.write_h5ad if suffix_in == ".h5ad" else rich_adata.write_zarr)(path_in)
    with pytest.warns(af.AnnformerWarning, match="2 cells"):
        record = embed_file(path_in, path_out, tiny_model, empty=empty)
    found = anndata.read_h5ad(path_out) if suffix_out == ".h5ad" else anndata.read_zarr(path_out)
    with pytest.warns(af.AnnformerWarning):
        expected = af.embed(rich_adata, tiny_model, copy=True, empty=empty)
    assert_equal_elements(found, expected)
    np.testing.assert_allclose(found.obsm[KEY], expected.obsm[KEY], rtol=0, atol=1e-6)
    assert found.uns["annformer"][KEY]["fingerprint"] == record["fingerprint"] == tiny_model.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([path_in.name, path_out.name])


def test_backed_reading_of_the_output_works(path_in, tiny_model, tmp_path):
    embed_file(path_in, tmp_path / "out.zarr", tiny_model)
    embed_file(tmp_path / "out.zarr", tmp_path / "again.h5ad", tiny_model, key_added="X_again")
    backed = anndata.read_h5ad(tmp_path / "again.h5ad", backed="r")
    assert backed.X[10:20].shape == (10, backed.n_vars)
    np.testing.assert_allclose(backed.obsm["X_again"], backed.obsm[KEY], rtol=0, atol=1e-6)


def test_content_embedding_keeps_obs_only(rich_adata, tiny_model, tmp_path):
    rich_adata.write_h5ad(tmp_path / "in.h5ad")
    with pytest.warns(af.AnnformerWarning):
        embed_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model, content="embedding", empty="drop")
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.shape == (58, 0)
    assert found.X is None
    assert list(found.obsm) == [KEY]
    assert found.obs.equals(rich_adata.obs.drop(index=["cell5", "cell40"]))


def test_10x_file_becomes_an_anndata_file(tiny_adata, tiny_model, tmp_path):
    adata = tiny_adata()
    with h5py.File(tmp_path / "in.h5", "w") as file:
        group = file.create_group("matrix")
        counts = sp.csr_matrix(adata.X.astype(np.int32))
        for name, value in {"data": counts.data, "indices": counts.indices, "indptr": counts.indptr, "shape": adata.shape[::-1]}.items():
            group[name] = value
        group["barcodes"] = adata.obs_names.to_numpy().astype("S")
        group["features/name"] = adata.var_names.to_numpy().astype("S")
        group["features/id"] = np.array([f"ENSG{i:011}" for i in range(adata.n_vars)], dtype="S")
        group["features/feature_type"] = np.array(["Gene Expression"] * adata.n_vars, dtype="S")
    embed_file(tmp_path / "in.h5", tmp_path / "out.h5ad", tiny_model)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    af.embed(adata, tiny_model)
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    assert found.obs_names.equals(adata.obs_names)
    assert found.var_names.equals(adata.var_names)
    assert set(found.var.columns) == {"gene_ids", "feature_types"}
    np.testing.assert_allclose(found.obsm[KEY], adata.obsm[KEY], rtol=0, atol=1e-6)


def test_file_of_an_old_anndata_is_read_whole(path_in, tiny_model, tmp_path):
    with h5py.File(path_in, "a") as file:
        for name in ("encoding-type", "encoding-version"):
            del file.attrs[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm[KEY].shape == (60, 32)


def test_existing_output_is_replaced_only_by_choice(path_in, tiny_model, tmp_path):
    for out in (tmp_path / "out.h5ad", tmp_path / "out.zarr", path_in):
        if out != path_in:
            embed_file(path_in, out, tiny_model)
        with pytest.raises(af.InputError, match="overwrite"):
            embed_file(path_in, out, tiny_model, key_added="X_new")
        embed_file(path_in, out, tiny_model, key_added="X_new", overwrite=True)
        found = anndata.read_zarr(out) if out.suffix == ".zarr" else anndata.read_h5ad(out)
        assert list(found.obsm) == ["X_new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad", "out.zarr"]


def test_only_files_and_stores_are_replaced(path_in, tiny_model, tmp_path):
    for name in ("out.h5ad", "out.zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
        with pytest.raises(af.InputError, match="folder and not a zarr store"):
            embed_file(path_in, tmp_path / name, tiny_model, overwrite=True)
        assert (tmp_path / name / "thesis.tex").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_output_that_holds_the_input_is_refused(tiny_adata, path_in, tiny_model, tmp_path):
    tiny_adata().write_zarr(tmp_path / "out.zarr")
    inside = path_in.rename(tmp_path / "out.zarr" / "in.h5ad")
    with pytest.raises(af.InputError, match="lies inside the output"):
        embed_file(inside, tmp_path / "out.zarr", tiny_model, overwrite=True)
    assert inside.exists()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("foreign", ["my own note", np.arange(3), pd.DataFrame({"a": [1]})])
def test_a_foreign_record_is_found_before_any_work(tiny_adata, tiny_model, tmp_path, monkeypatch, suffix, foreign):
    adata, path = tiny_adata(), tmp_path / f"in{suffix}"
    adata.uns["annformer"] = foreign
    (adata.write_h5ad if suffix == ".h5ad" else adata.write_zarr)(path)
    with monkeypatch.context() as patch:
        patch.setattr(_encoding, "encode_cells", lambda *_, **__: pytest.fail("the work had begun"))
        with pytest.raises(af.InputError, match="not a mapping"):
            embed_file(path, tmp_path / f"out{suffix}", tiny_model)
    embed_file(path, tmp_path / f"out{suffix}", tiny_model, content="embedding")


def test_an_embedding_of_that_name_is_replaced(path_in, tiny_model, tmp_path):
    embed_file(path_in, tmp_path / "out.h5ad", tiny_model, max_length=30)
    embed_file(tmp_path / "out.h5ad", tmp_path / "out2.h5ad", tiny_model)
    found = anndata.read_h5ad(tmp_path / "out2.h5ad")
    assert found.uns["annformer"][KEY]["settings"]["max_length"] == 1200
    assert found.obsm[KEY].shape == (60, 32)


# failures


def test_bad_input_leaves_nothing(tiny_adata, tiny_model, tmp_path):
    adata = tiny_adata()
    values = adata.X.toarray()
    values[50, 7] = np.nan
    adata.X = sp.csr_matrix(values)
    adata.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(af.InputError, match="NaN"):
        embed_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model)
    with pytest.raises(af.InputError, match="does not exist"):
        embed_file(tmp_path / "im.h5ad", tmp_path / "out.h5ad", tiny_model)
    with pytest.raises(af.InputError, match=r"h5ad or \.zarr"):
        embed_file(tmp_path / "in.h5ad", tmp_path / "out.csv", tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_unwritable_folder_is_found_before_any_work(path_in, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out.h5ad", tmp_path / "nowhere" / "out.h5ad", "/proc/out.h5ad"):
        with pytest.raises(af.InputError, match="nothing can be written"):
            embed_file(path_in, out, "a model that does not exist either")


def test_a_disk_too_small_is_found_before_any_work(path_in, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(_output.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(af.InputError, match="GB free"):
        embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


FULL_DISK = """
import os, resource, sys
import annformer as af
size = os.path.getsize("in.h5ad")
for number, limit in enumerate([100, 9_000, 60_000, size - 1, size + 1_000, size + 20_000]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        af.embed_file("in.h5ad", f"out{number}" + sys.argv[1], model="model", workers=0)
        print("written")
    except af.InputError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize(("suffix", "n_full"), [(".h5ad", 6), (".zarr", 3)])
def test_full_disk_is_one_clear_error(tiny_adata, tiny_model, tmp_path, suffix, n_full):
    """In another process, because file size limits are the process's. The files of the zarr store are small."""
    cells = tiny_adata(n_obs=400)
    cells.layers["more"] = cells.X.toarray()
    cells.write_h5ad(tmp_path / "in.h5ad")
    tiny_model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-c", FULL_DISK, suffix]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("the disk is full") for line in lines[:n_full])
    assert lines[n_full:] == ["written"] * (6 - n_full)
    outputs = {path.name for path in tmp_path.glob(f"out*{suffix}")}
    assert outputs == {f"out{number}{suffix}" for number in range(n_full, 6)}
    for left in tmp_path.glob("out*.partial"):
        assert {path.name for path in left.iterdir()} == {"rows.npy", "journal.json"}


@contextmanager
def files_up_to(n_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_after_a_refusal_hdf5_finds_again_what_it_wrote(tmp_path):
    """Else it takes what happens to be in its memory for the structure of the file."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["old"] = np.arange(1_000)
    size = path.stat().st_size
    beyond, across = bytearray(b"?" * 40), bytearray(210)
    with files_up_to(size + 100), pytest.raises(OSError, match="File too large"), write._FullDiskGuard(path, "r+") as guard:
        guard.seek(size - 50)
        guard.write(bytes(range(200)))
        guard.seek(size + 5_000)
        guard.write(b"in the next page")
        guard.seek(size + 4_990)
        guard.readinto(beyond)
        guard.seek(size - 50)
        guard.readinto(across)
        guard.seek(1 << 30)
        guard.write(bytes(write._LARGE))
    assert beyond == bytes(10) + b"in the next page" + bytes(14)
    assert across == bytes(range(200)) + bytes(10)
    assert len(guard._kept) <= 4  # data are not kept


@pytest.mark.parametrize("room", [0, 3_000, 20_000])
def test_hdf5_goes_on_in_peace_on_a_full_disk(tmp_path, room):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["old"] = np.arange(1_000)
    found = []
    with files_up_to(path.stat().st_size + room), pytest.raises(OSError, match="File too large"), write.opened(path, "r+") as file:
        for number in range(300):
            file.create_group(f"group{number}")["text"] = [f"{number} and more"] * 20
        file.flush()
        found = [str(file[f"group{number}/text"].asstr()[7]) for number in range(300)]
    assert found == [f"{number} and more" for number in range(300)]


# going on


def test_interrupted_run_goes_on_to_the_same_bits(path_in, tiny_model, tmp_path, monkeypatch, caplog):
    embed_file(path_in, tmp_path / "whole.h5ad", tiny_model)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedError):
            embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert "40 of 60 cells" in caplog.text
    assert "resume" in caplog.text
    assert not (tmp_path / "out.h5ad").exists()
    assert json.loads((tmp_path / "out.h5ad.partial" / "journal.json").read_text())["done"] == 40
    encoded = []
    whole = _encoding.encode_cells
    monkeypatch.setattr(_encoding, "encode_cells", lambda *a, **o: (encoded.append(o["start"]), whole(*a, **o))[1])
    embed_file(path_in, tmp_path / "out.h5ad", tiny_model, resume=True)
    assert encoded == [40]
    one, two = (anndata.read_h5ad(tmp_path / name).obsm[KEY] for name in ("whole.h5ad", "out.h5ad"))
    np.testing.assert_array_equal(one, two)
    assert not (tmp_path / "out.h5ad.partial").exists()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_run_stopped_while_writing_needs_no_second_embedding(path_in, tiny_model, tmp_path, monkeypatch, suffix):
    whole = embedding.write_copy

    def stopping(source, path_in, path_out, *args, **options):
        whole(source, path_in, path_out, *args, **options)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "write_copy", stopping)
        patch.setattr(_output.Output, "_remove", lambda *_: None)  # as if the process had been killed
        with pytest.raises(StoppedError):
            embed_file(path_in, tmp_path / f"out{suffix}", tiny_model)
    assert (tmp_path / f"out{suffix}.partial" / f"result{suffix}").exists()
    stop_after(monkeypatch, 0)  # no cell is embedded any more
    embed_file(path_in, tmp_path / f"out{suffix}", tiny_model, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", f"out{suffix}"]


def test_refused_empty_cells_do_not_cost_the_work(rich_adata, tiny_model, tmp_path, caplog):
    rich_adata.X = rich_adata.layers["counts"].tocsr()
    counts = rich_adata.X.tolil()
    counts[5] = rich_adata.layers["dense"][6]  # the other empty cell comes late
    for layer in list(rich_adata.layers):
        del rich_adata.layers[layer]
    rich_adata.X = counts.tocsr()
    rich_adata.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(af.InputError, match=r"\(cell40\)(.|\n)*--empty(.|\n)*--resume"):
        embed_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model, empty="error")
    assert "40 of 60 cells are done and kept" in caplog.text
    with pytest.warns(af.AnnformerWarning, match="cell40"):
        embed_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model, resume=True)
    assert np.isnan(anndata.read_h5ad(tmp_path / "out.h5ad").obsm[KEY][:, 0]).sum() == 1


def test_empty_cells_that_an_earlier_run_allowed_are_refused(rich_adata, tiny_model, tmp_path, monkeypatch):
    rich_adata.write_h5ad(tmp_path / "in.h5ad")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StoppedError):
            embed_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model)
    with pytest.raises(af.InputError, match=r"\(cell5, cell40\)"):
        embed_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model, empty="error", resume=True)
    assert (tmp_path / "out.h5ad.partial" / "journal.json").exists()


def test_second_run_on_the_same_output_is_refused(path_in, tiny_model, tmp_path, monkeypatch):
    whole = _encoding.encode_cells

    def meanwhile(*args, **options):
        with pytest.raises(af.InputError, match="another run"):
            embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
        return whole(*args, **options)

    monkeypatch.setattr(_encoding, "encode_cells", meanwhile)
    embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_ctrl_c_before_any_work_leaves_nothing(path_in, tiny_model, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_ctrl_c_keeps_the_work_done_and_says_how_to_go_on(path_in, tiny_model, tmp_path, monkeypatch, caplog):
    stop_after(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert "are done and kept" in caplog.text
    assert "embed and prepare do with --resume" in str(explain(caught.value))
    assert json.loads((tmp_path / "out.h5ad.partial" / "journal.json").read_text())["done"] == 24


@pytest.fixture
def interrupted(path_in, tiny_model, tmp_path, monkeypatch):
    """Output path of a run that was stopped half way."""
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedError):
            embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    return tmp_path / "out.h5ad"


@pytest.mark.parametrize("change", ["model", "max_length", "seed", "input"])
def test_resume_refuses_another_job_and_says_what_differs(interrupted, path_in, tiny_model, tiny_adata, change):
    import torch

    options = {"max_length": {"max_length": 30}, "seed": {"seed": 4}}.get(change, {})
    if change == "model":
        with torch.no_grad():
            tiny_model.encoder.gene.weight.add_(0.5)
    if change == "input":
        tiny_adata(seed=1).write_h5ad(path_in)
    with pytest.raises(af.InputError, match=f"{change}.* was .*, is ") as caught:
        embed_file(path_in, interrupted, tiny_model, resume=True, **options)
    assert "--resume" in str(caught.value)
    assert (interrupted.with_name("out.h5ad.partial") / "journal.json").exists()  # a slip does not cost the work


def test_without_resume_the_work_is_discarded_by_choice_only(interrupted, path_in, tiny_model, caplog):
    with pytest.raises(af.InputError, match=r"32 of 60 cells(.|\n)*--resume(.|\n)*--overwrite"):
        embed_file(path_in, interrupted, tiny_model)
    assert (interrupted.with_name("out.h5ad.partial") / "journal.json").exists()
    embed_file(path_in, interrupted, tiny_model, overwrite=True)
    assert "discarding" in caplog.text
    assert interrupted.exists()
    assert not interrupted.with_name("out.h5ad.partial").exists()


def test_a_mistake_in_the_next_call_does_not_discard_the_work(interrupted, path_in, tiny_model):
    with pytest.raises(af.InputError, match="gene_key"):
        embed_file(path_in, interrupted, tiny_model, gene_key="symbol")
    assert (interrupted.with_name("out.h5ad.partial") / "journal.json").exists()


def test_damaged_journal_is_refused(interrupted, path_in, tiny_model):
    (interrupted.with_name("out.h5ad.partial") / "journal.json").write_text("{")
    with pytest.raises(af.InputError, match="journal"):
        embed_file(path_in, interrupted, tiny_model, resume=True)
    embed_file(path_in, interrupted, tiny_model)  # nothing is lost


def test_resume_without_earlier_work_just_runs(path_in, tiny_model, tmp_path):
    embed_file(path_in, tmp_path / "out.h5ad", tiny_model, resume=True)
    assert (tmp_path / "out.h5ad").exists()


@pytest.mark.slow
def test_killed_process_goes_on_to_the_same_bits(tiny_adata, tiny_model, tmp_path):
    tiny_adata(n_obs=3000).write_h5ad(tmp_path / "in.h5ad")
    tiny_model.save_pretrained(tmp_path / "model")
    code = (
        "import sys, annformer as af\n"
        "from annformer import inference\n"
        "from annformer.tasks import embedding\n"
        "inference.CELLS_PER_READ, embedding.FLUSH_EVERY = 64, 128\n"
        "af.embed_file('in.h5ad', sys.argv[1], model='model', threads=1, resume=True)\n"
    )
    command = [sys.executable, "-c", code, "out.h5ad"]
    subprocess.run([*command[:3], "whole.h5ad"], cwd=tmp_path, check=True, capture_output=True)
    journal, killed, done = tmp_path / "out.h5ad.partial" / "journal.json", 0, 0
    while killed < 3:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or json.loads(journal.read_text())["done"] <= done):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was killed before it could end"
        killed, done = killed + 1, json.loads(journal.read_text())["done"]
        assert not (tmp_path / "out.h5ad").exists()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    one, two = (anndata.read_h5ad(tmp_path / name).obsm[KEY] for name in ("whole.h5ad", "out.h5ad"))
    np.testing.assert_array_equal(one, two)
    assert not journal.exists()


def test_resume_of_a_run_killed_before_anything_was_safe_begins_anew(path_in, tiny_model, tmp_path):
    embed_file(path_in, tmp_path / "whole.h5ad", tiny_model)
    partial = tmp_path / "out.h5ad.partial"
    partial.mkdir()
    (partial / "rows.npy").write_bytes(b"what a kill left of the first rows")
    embed_file(path_in, tmp_path / "out.h5ad", tiny_model, resume=True)
    one, two = (anndata.read_h5ad(tmp_path / name).obsm[KEY] for name in ("whole.h5ad", "out.h5ad"))
    np.testing.assert_array_equal(one, two)
    assert not partial.exists()


def test_slow_work_is_made_safe_by_the_clock(path_in, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "FLUSH_SECONDS", 0.0)
    safe = []
    from annformer.data.partial import PartialRows

    flush = PartialRows.flush
    monkeypatch.setattr(PartialRows, "flush", lambda rows: (flush(rows), safe.append(rows.done))[0])
    embed_file(path_in, tmp_path / "out.h5ad", tiny_model)
    assert len(safe) > 1
    assert safe[-1] == 60
