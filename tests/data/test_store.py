"""The store: what goes in comes out, once, in an order of its own, whatever happens on the way."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annformer.data import AnnDataSource, CellSource
from annformer.data import store_writer as writer
from annformer.data.find_studies import find_studies, study_names
from annformer.data.store import MANIFEST, StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from annformer.inference import encode_cells, estimate
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.vocab import GeneVocab


@pytest.fixture
def files(tmp_path, tiny_adata) -> list[Path]:
    """Three studies: h5ad with labels, a zarr store with other genes, an mtx folder."""
    blood, lung, skin = tiny_adata(80, seed=1), tiny_adata(50, seed=2)[:, 40:].copy(), tiny_adata(30, seed=3)
    blood.obs["tissue"] = "blood"
    blood.write_h5ad(tmp_path / "blood.h5ad")
    with ad.settings.override(zarr_write_format=3):
        lung.write_zarr(tmp_path / "lung.zarr")
    write_mtx(skin, tmp_path / "skin")
    return [tmp_path / name for name in ("blood.h5ad", "lung.zarr", "skin")]


def write_mtx(adata: ad.AnnData, folder: Path) -> None:
    from scipy.io import mmwrite

    folder.mkdir(parents=True)
    mmwrite(folder / "matrix.mtx", sp.coo_matrix(adata.X.T.astype(int)))
    pd.DataFrame({"id": adata.var_names, "name": adata.var_names}).to_csv(folder / "genes.tsv", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv", sep="\t", header=False, index=False)


def content(cells, vocab: GeneVocab) -> list[tuple[tuple[str, float], ...]]:
    """Every cell as its sorted (gene, count) pairs."""
    found = []
    for row in range(len(cells.rows)):
        begin, end = cells.counts.indptr[row : row + 2]
        names = [vocab.tokens[cells.gene_ids[column]] for column in cells.counts.indices[begin:end]]
        found.append(tuple(sorted(zip(names, cells.counts.data[begin:end].tolist(), strict=True))))
    return found


def cells_of(paths: list[Path], vocab: GeneVocab) -> list:
    return [cell for path in paths for batch in AnnDataSource(path).batches(64, vocab=vocab) for cell in content(batch, vocab)]


def hashes(store: Path) -> list[str]:
    return [shard["sha256"] for shard in json.loads((store / MANIFEST).read_text())["shards"]]


def test_all_cells_come_back_shuffled(files, tmp_path):
    manifest = write_store(files, tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    assert isinstance(store, CellSource)
    assert store.n_obs == manifest.n_cells == 160
    cells = content(store.rows(np.arange(160)), store.vocab)
    put_in = cells_of(files, store.vocab)
    assert sorted(cells) == sorted(put_in)
    assert cells != put_in
    studies = store.codes("source")
    assert len(set(studies[:40].tolist())) == 3, "the studies are not mixed"
    assert list(map(len, cells)) == store.lengths.tolist()
    assert manifest.n_values == store.lengths.sum()


def test_labels_and_origin(files, tmp_path):
    write_store(files, tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    batch = store.rows([5, 0, 77], label_keys={"where": "tissue", "batch": "study"})
    assert set(store.categories["where"]) == {"blood", "unknown"}
    assert store.categories["batch"] == ("blood", "lung", "skin")
    names = store.names([5, 0, 77])
    for i, name in enumerate(names):
        file, row = name.split(":")
        path = next(path for path in files if path.name == file)
        assert store.categories["batch"][batch.labels["batch"][i]] == path.stem
        assert store.categories["where"][batch.labels["where"][i]] == ("blood" if path.stem == "blood" else "unknown")
        original = next(AnnDataSource(path).batches(1, vocab=store.vocab, rows=np.array([int(row)])))
        assert content(original, store.vocab) == content(store.rows([[5, 0, 77][i]]), store.vocab)
    with pytest.raises(InputError, match="tissue"):
        store.codes("tisue")


@pytest.mark.parametrize("memory_gb", [2e-5, 1e-4])
def test_order_depends_on_content_and_seed_only(files, tmp_path, memory_gb):
    write_store(files, tmp_path / "whole")
    manifest = write_store(files[::-1], tmp_path / "parts", memory_gb=memory_gb, shard_bytes=20_000)
    assert len(manifest.shards) > 3
    whole, parts = StoreSource(tmp_path / "whole"), StoreSource(tmp_path / "parts")
    every = np.arange(whole.n_obs)
    assert content(whole.rows(every), whole.vocab) == content(parts.rows(every), parts.vocab)
    write_store(files, tmp_path / "seeded", seed=1)
    seeded = StoreSource(tmp_path / "seeded")
    assert content(whole.rows(every), whole.vocab) != content(seeded.rows(every), seeded.vocab)


def test_bytes_repeat(files, tmp_path):
    for name in ("a", "b"):
        write_store(files, tmp_path / name, memory_gb=2e-5)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_duplicate_and_empty_cells_are_dropped(tmp_path, tiny_adata):
    adata = tiny_adata(40)
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(40) != 3)[:, None])
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = adata[[7, 9, 11]].copy()[:, ::-1].copy()
    again.obs_names = ["x", "y", "z"]
    again.write_h5ad(tmp_path / "b.h5ad")
    manifest = write_store([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "store")
    first, second = manifest.sources
    assert (first.n_empty, first.n_kept) == (1, 39)
    assert (second.n_duplicates, second.n_kept) == (3, 0)
    assert StoreSource(tmp_path / "store").n_obs == 39


def test_genes_meet_under_approved_names(tmp_path, tiny_adata):
    for name, old in (("a", {}), ("b", {"TMEM123": "KCT3", "SKP1": "SKP1A", "NEDD8": "nedd8"})):
        adata = tiny_adata(20, seed=len(name + str(old)))
        adata.var_names = [old.get(gene, gene) for gene in adata.var_names]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    manifest = write_store([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "store")
    vocab = StoreSource(tmp_path / "store").vocab
    assert {"TMEM123", "SKP1", "NEDD8"} <= set(vocab.genes)
    assert not {"KCT3", "SKP1A", "nedd8"} & set(vocab.genes)
    assert list(vocab.genes) == sorted(vocab.genes)
    assert manifest.sources[1].genes["by_how"].keys() >= {"case"}
    table = pd.read_csv(tmp_path / "store" / "genes.tsv", sep="\t", keep_default_na=False)
    assert table.gene.tolist() == list(vocab.genes)
    cells = StoreSource(tmp_path / "store").rows(np.arange(manifest.n_cells))
    assert table.n_cells.tolist() == np.bincount(cells.counts.indices, minlength=len(vocab))[table.id].tolist()
    assert table.total.sum() == cells.counts.sum()
    assert manifest.n_genes == (table.n_cells > 0).sum()


class TestExclude:
    def test_cells_are_recognised_over_shared_genes(self, tmp_path, tiny_adata):
        """The held-out file has fewer genes, other names of cells, and one gene counted otherwise."""
        rng = np.random.default_rng(0)
        adata = tiny_adata(60)
        adata.X = sp.csr_matrix(rng.poisson(1.5, adata.shape).astype(np.float32))
        adata.write_h5ad(tmp_path / "p.h5ad")
        held = adata[10:25, rng.permutation(adata.n_vars)[:250]].copy()
        held.X = sp.csr_matrix(np.hstack([np.full((15, 1), 99), held.X.toarray()[:, 1:]]).astype(np.float32))
        held.obs_names = [f"other{i}" for i in range(held.n_obs)]
        held.write_h5ad(tmp_path / "e.h5ad")
        manifest = write_store([tmp_path / "p.h5ad"], tmp_path / "store", exclude=[tmp_path / "e.h5ad"])
        store = StoreSource(tmp_path / "store")
        assert manifest.sources[0].n_excluded == 15
        assert manifest.sources[0].found_in == {"e": 15}
        assert manifest.held_out[0].n_found == 15
        assert sorted(store.codes("row").tolist()) == [*range(10), *range(25, 60)]

    def test_other_cells_stay(self, files, tmp_path, tiny_adata):
        tiny_adata(50, seed=77).write_h5ad(tmp_path / "e.h5ad")
        assert write_store(files, tmp_path / "store", exclude=[tmp_path / "e.h5ad"]).n_cells == 160

    def test_nothing_left(self, files, tmp_path):
        with pytest.raises(InputError, match="no cell is left"):
            write_store(files[:1], tmp_path / "store", exclude=[write_copy(files[0])])
        assert not list(tmp_path.glob("store*"))


def write_copy(path: Path) -> Path:
    copy = path.with_name("copy.h5ad")
    adata = ad.read_h5ad(path)
    adata.X = sp.csr_matrix(np.where(adata.X.toarray() > 0, adata.X.toarray(), 0))
    adata.write_h5ad(copy)
    return copy


class TestResume:
    @pytest.mark.parametrize("stop_at", [1, 3, 8])
    def test_stopped_run_ends_with_the_same_bytes(self, files, tmp_path, monkeypatch, stop_at):
        options = {"memory_gb": 2e-5, "shard_bytes": 20_000, "exclude": files[2:]}
        monkeypatch.setattr(writer, "CELLS_PER_READ", 16)
        write_store(files[:2], tmp_path / "whole", **options)
        calls = 0

        def stop(phase: str, done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at or (phase == "writing" and calls > 11 - stop_at):
                msg = "stopped"
                raise RuntimeError(msg)

        with pytest.raises(RuntimeError, match="stopped"):
            write_store(files[:2], tmp_path / "store", progress=stop, **options)
        assert not (tmp_path / "store").exists()
        write_store(files[:2], tmp_path / "store", resume=True, **options)
        assert not (tmp_path / "store.partial").exists()
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes(), path.name

    def test_killed_run_goes_on(self, files, tmp_path):
        """Kill the process in the middle of an append: what came after the journal does not count."""
        import os
        import signal
        import subprocess
        import sys

        script = f"""
import os, signal
from annformer.data import store_writer as writer
from annformer.data.find_studies import find_studies, study_names
writer.CELLS_PER_READ = 16
calls = 0
def progress(phase, done, total):
    global calls
    calls += 1
    if calls == 7:
        for path in writer.Path({str(tmp_path)!r}).glob("store.partial/buckets/bucket*"):
            path.open("ab").write(b"half a cell")
        os.kill(os.getpid(), signal.SIGKILL)
writer.write_store({[str(f) for f in files]!r}, {str(tmp_path / "store")!r}, memory_gb=2e-5, progress=progress)
"""
        killed = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False, capture_output=True, env=dict(os.environ))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        write_store(files, tmp_path / "store", memory_gb=2e-5, resume=True)
        write_store(files, tmp_path / "whole", memory_gb=2e-5)
        assert hashes(tmp_path / "store") == hashes(tmp_path / "whole")

    def test_other_job_is_refused(self, files, tmp_path):
        self._stop(files, tmp_path)
        with pytest.raises(InputError, match="other seed"):
            write_store(files, tmp_path / "store", memory_gb=2e-5, seed=3, resume=True)
        with pytest.raises(InputError, match="other studies"):
            write_store(files[:2], tmp_path / "store", memory_gb=2e-5, resume=True)
        assert (tmp_path / "store.partial").exists()

    def test_finished_shard_that_is_gone_is_noticed(self, files, tmp_path):
        options = {"memory_gb": 2e-5, "shard_bytes": 20_000}
        seen = []

        def stop(phase: str, *_: object) -> None:
            seen.append(phase)
            if seen.count("writing") == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_store(files, tmp_path / "store", progress=stop, **options)
        next((tmp_path / "store.partial" / "store").glob("shard*")).unlink()
        with pytest.raises(InputError, match="is missing or has another size"):
            write_store(files, tmp_path / "store", resume=True, **options)
        assert write_store(files, tmp_path / "store", **options).n_cells == 160

    def test_without_resume_it_begins_anew(self, files, tmp_path, caplog):
        self._stop(files, tmp_path)
        assert write_store(files, tmp_path / "store").n_cells == 160
        assert "discarding the unfinished work" in caplog.text

    def _stop(self, files: list[Path], tmp_path: Path) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_store(files, tmp_path / "store", memory_gb=2e-5, progress=lambda phase, *_: stop() if phase == "writing" else None)

    def test_finished_store_is_kept_until_the_new_one_is_whole(self, files, tmp_path):
        write_store(files, tmp_path / "store")
        with pytest.raises(InputError, match="exists already"):
            write_store(files, tmp_path / "store")
        before = hashes(tmp_path / "store")
        with pytest.raises(RuntimeError):
            write_store(files, tmp_path / "store", overwrite=True, seed=1, progress=_fail)
        assert hashes(tmp_path / "store") == before
        write_store(files, tmp_path / "store", overwrite=True, seed=1)
        assert hashes(tmp_path / "store") != before


def _fail(*_: object) -> None:
    msg = "no"
    raise RuntimeError(msg)


class TestVocabulary:
    def test_another_one_is_read_into(self, files, tmp_path, tiny_vocab):
        write_store(files, tmp_path / "store")
        store = StoreSource(tmp_path / "store")
        names = ["<cls>", "cd20", "ZFP36", "ACTB", "CD3E", "CORO1A", "NOT-IN-IT", "LYZ"]
        other = GeneVocab(names + [g for g in tiny_vocab.genes[:80] if g not in names])
        (batch,) = store.batches(200, vocab=other)
        expected = [
            tuple(pair for pair in cell if pair[0] in set(other.genes)) for cell in content(store.rows(np.arange(160)), store.vocab)
        ]
        assert content(batch, other) == expected
        assert (np.diff(batch.gene_ids) > 0).all()
        assert store.match(other).share < 1

    def test_it_may_be_given(self, files, tmp_path, tiny_vocab):
        write_store(files, tmp_path / "store", vocab=tiny_vocab)
        store = StoreSource(tmp_path / "store")
        assert store.vocab == tiny_vocab
        assert sorted(content(store.rows(np.arange(160)), tiny_vocab)) == sorted(cells_of(files, tiny_vocab))


def test_tokens_are_those_of_the_file(files, tmp_path, tiny_vocab):
    write_store(files[:1], tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    source = AnnDataSource(files[0])
    for rows in ([3, 1, 70], [0]):
        mine = tokenize(store.rows(rows, vocab=tiny_vocab), TokenizerSettings(max_length=60), cls_id=tiny_vocab.cls_id).check()
        there = store.codes("row", rows)
        (cells,) = source.batches(9, vocab=tiny_vocab, rows=there)
        theirs = tokenize(cells, TokenizerSettings(max_length=60), cls_id=tiny_vocab.cls_id)
        assert (mine.gene_ids == theirs.gene_ids).all()
        assert (mine.values == theirs.values).all()


class TestMeasured:
    """Genes that a source measured are told from those that it lacks, be they expressed or not."""

    @pytest.fixture
    def store(self, files, tmp_path) -> StoreSource:
        blood = ad.read_h5ad(files[0])
        blood.X = sp.csr_matrix(blood.X.toarray() * (blood.var_names != "LYZ"))  # measured, and nowhere expressed in this file
        blood.write_h5ad(files[0])
        write_store(files, tmp_path / "store")
        return StoreSource(tmp_path / "store")

    def expected(self, files: list[Path], store: StoreSource, vocab: GeneVocab, ids: np.ndarray) -> np.ndarray:
        """Row by row of the store, whether the file of the cell has a column for each gene."""
        of_file = [np.isin(ids, AnnDataSource(path).match(vocab).ids) for path in files]
        return np.array(of_file)[store.codes("source")]

    def test_columns_of_every_file_are_recorded(self, files, store):
        batch = store.rows(np.arange(160))
        found = batch.measured.genes[batch.measured.study]
        assert found.tolist() == self.expected(files, store, store.vocab, batch.gene_ids).tolist()
        assert not found.all()
        lyz, of_blood = store.vocab.ids(["LYZ"])[0], store.codes("source") == 0
        assert found[of_blood, lyz].all()
        assert not batch.counts.toarray()[of_blood, lyz].any()
        assert (found | (batch.counts.toarray() == 0)).all()
        assert batch.n_measured.tolist() == found.sum(1).tolist() == store.n_measured_over(store.vocab).tolist()

    def test_over_another_vocabulary(self, files, store, tiny_vocab):
        for vocab in (
            tiny_vocab,
            GeneVocab(["<cls>", "cd20", *tiny_vocab.genes[::-2]]),
            GeneVocab(tiny_vocab.tokens, tiny_vocab.genes[::3]),
        ):
            batch = store.rows([9, 4, 150], vocab=vocab)
            found = batch.measured.genes[batch.measured.study]
            assert found.tolist() == self.expected(files, store, vocab, batch.gene_ids)[[9, 4, 150]].tolist()
            assert store.n_measured_over(vocab)[[9, 4, 150]].tolist() == batch.n_measured.tolist() == found.sum(1).tolist()

    def test_some_cells_of_a_batch(self, store):
        batch, order = store.rows([9, 4, 150, 8]), np.array([2, 0])
        some, same = batch.take(order), store.rows([150, 9])
        assert (some.counts != same.counts).nnz == 0
        assert (some.rows.tolist(), some.measured.study.tolist()) == (same.rows.tolist(), same.measured.study.tolist())
        assert store.rows([]).n_measured.tolist() == []

    def test_inference_counts_them(self, store, tiny_model):
        settings = TokenizerSettings(zeros="all")
        cells = store.rows(np.arange(160), vocab=tiny_model.vocab)
        tokens = tokenize(cells, settings, cls_id=tiny_model.vocab.cls_id)
        assert tokens.offsets.diff().tolist() == (1 + cells.n_measured).tolist()
        assert estimate(tiny_model, store, settings=settings).mean_tokens == pytest.approx(tokens.n_tokens / 160)

    def test_sources_with_the_same_genes_need_no_record(self, files, tmp_path):
        write_store([files[0], files[2]], tmp_path / "alike")
        store = StoreSource(tmp_path / "alike")
        assert store.rows([1, 5]).measured is None
        assert set(store.n_measured_over(store.vocab)) == {len(store.vocab.genes)}

    def test_one_source_over_a_larger_vocabulary(self, files, tmp_path, tiny_vocab):
        write_store(files[1:2], tmp_path / "one", vocab=tiny_vocab)
        store = StoreSource(tmp_path / "one")
        matched = np.unique(AnnDataSource(files[1]).match(tiny_vocab).ids)
        assert set(store.n_measured_over(tiny_vocab)) == {int((matched >= 0).sum())}
        assert int((matched >= 0).sum()) < len(tiny_vocab.genes)

    def test_a_store_of_before_opens_but_has_no_zeros(self, store, tiny_model):
        before, manifest = content(store.rows([3, 1]), store.vocab), json.loads((store.path / MANIFEST).read_text())
        del manifest["measured"]
        (store.path / MANIFEST).write_text(json.dumps(manifest))
        (store.path / "measured.npy").unlink()
        old = StoreSource(store.path)
        old.verify()
        assert content(old.rows([3, 1]), old.vocab) == before
        assert old.rows([3, 1]).measured is None
        with pytest.raises(InputError, match=r"does not say which genes(.|\n)*annformer prepare"):
            next(encode_cells(tiny_model, old, settings=TokenizerSettings(zeros=1.0)))
        assert len(next(encode_cells(tiny_model, old))[0]) == 160


def test_batches_go_on_from_start(files, tmp_path):
    write_store(files, tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    rows = np.random.default_rng(0).permutation(160)
    whole = [row for batch in store.batches(7, vocab=store.vocab, rows=rows) for row in batch.rows.tolist()]
    rest = [row for batch in store.batches(7, vocab=store.vocab, rows=rows, start=93) for row in batch.rows.tolist()]
    assert whole == rows.tolist()
    assert rest == whole[93:]
    assert store.rows([]).counts.shape[0] == 0
    with pytest.raises(IndexError):
        store.rows([160])


def test_source_can_be_pickled(files, tmp_path):
    write_store(files, tmp_path / "store")
    store = StoreSource(tmp_path / "store")
    again = pickle.loads(pickle.dumps(store))
    assert content(again.rows([4, 2]), again.vocab) == content(store.rows([4, 2]), store.vocab)


class TestDamage:
    @pytest.fixture
    def store(self, files, tmp_path) -> Path:
        write_store(files, tmp_path / "store", memory_gb=2e-5, shard_bytes=20_000)
        return tmp_path / "store"

    def test_sound_store_passes(self, store):
        steps = []
        StoreSource(store).verify(lambda done, total: steps.append(done / total))
        assert steps[-1] == 1

    def test_changed_shard_is_named(self, store):
        shard = sorted(store.glob("*.arrow"))[2]
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        with pytest.raises(InputError, match=f"1 of its .* files are not what was written: {shard.name}"):
            StoreSource(store).verify()

    def test_changed_table_of_measured_genes_is_named(self, store):
        file = store / "measured.npy"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"1 of its .* files are not what was written: measured\.npy"):
            StoreSource(store).verify()
        file.write_bytes(data[:-1])
        with pytest.raises(InputError, match=r"measured\.npy has .* bytes, its manifest says"):
            StoreSource(store)

    def test_short_shard_is_refused_when_opened(self, store):
        shard = sorted(store.glob("*.arrow"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(InputError, match=rf"{shard.name} has .* bytes, its manifest says"):
            StoreSource(store)

    def test_missing_shard_is_named(self, store):
        shard = sorted(store.glob("*.arrow"))[-1]
        shard.unlink()
        with pytest.raises(InputError, match=f"{shard.name} is missing"):
            StoreSource(store)

    def test_header_of_a_shard(self, store):
        shard = sorted(store.glob("*.arrow"))[0]
        shard.write_bytes(bytes(shard.stat().st_size))
        with pytest.raises(InputError, match=shard.name):
            StoreSource(store)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda m: m.update(format=9), "format 9"),
            (lambda m: m.update(colour="red"), "colour"),
            (lambda m: m.update(n_cells=3), "its manifest says 3"),
        ],
    )
    def test_manifest(self, store, change, words):
        manifest = json.loads((store / MANIFEST).read_text())
        change(manifest)
        (store / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=words):
            StoreSource(store)

    def test_no_store(self, tmp_path):
        with pytest.raises(InputError, match="not a store"):
            StoreSource(tmp_path)


class TestBadInput:
    def test_log_normalised_data_need_leave(self, files, tmp_path):
        adata = ad.read_h5ad(files[0])
        adata.X = adata.X.log1p()
        adata.write_h5ad(tmp_path / "log.h5ad")
        with pytest.raises(InputError, match=r"log\.h5ad holds no raw counts: X is log-normalised"):
            write_store([files[0], tmp_path / "log.h5ad"], tmp_path / "store")
        assert not list(tmp_path.glob("store*"))
        manifest = write_store([files[0], tmp_path / "log.h5ad"], tmp_path / "store", allow_normalised=True)
        assert [source.kind for source in manifest.sources] == ["counts", "log-normalised"]

    @pytest.mark.filterwarnings("ignore::annformer.errors.AnnformerWarning")
    def test_fractions_far_into_a_file_are_met(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr("annformer.data.readers.SAMPLE_VALUES", 50)
        adata = ad.read_h5ad(files[0])
        adata.X.data[len(adata.X.data) // 4] = 1.5
        adata.write_h5ad(tmp_path / "some.h5ad")
        with pytest.raises(InputError, match="hold fractions"):
            write_store([tmp_path / "some.h5ad"], tmp_path / "store")
        assert not list(tmp_path.glob("store*"))

    def test_a_file_twice(self, files, tmp_path):
        with pytest.raises(InputError, match="more than once"):
            write_store([files[0], files[0]], tmp_path / "store")

    def test_no_room(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(InputError, match="may need"):
            write_store(files, tmp_path / "store")
        assert not list(tmp_path.glob("store*"))

    def test_full_disk_keeps_the_work(self, files, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr("annformer.data.store_shards.ShardWriter.write", full)
            write_store(files, tmp_path / "store")
        assert write_store(files, tmp_path / "store", resume=True).n_cells == 160

    @pytest.mark.parametrize(("options", "words"), [({"columns": ["row"]}, "'row'"), ({"memory_gb": 0}, "memory_gb")])
    def test_options(self, files, tmp_path, options, words):
        with pytest.raises(InputError, match=words):
            write_store(files, tmp_path / "store", **options)

    def test_second_run_is_refused(self, files, tmp_path):
        def second(*_: object) -> None:
            with pytest.raises(InputError, match="another run"):
                write_store(files, tmp_path / "store")

        write_store(files, tmp_path / "store", progress=second)


class TestStudies:
    @pytest.mark.usefixtures("files")
    def test_folders_are_searched(self, tmp_path, tiny_adata):
        write_mtx(tiny_adata(5), tmp_path / "more" / "patient1" / "filtered")
        write_mtx(tiny_adata(6), tmp_path / "more" / "patient2" / "filtered")
        found = find_studies([tmp_path])
        assert study_names(found) == ["blood", "lung", "patient1/filtered", "patient2/filtered", "skin"]
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="holds no cells"):
            find_studies([tmp_path / "empty"])

    @pytest.mark.usefixtures("files")
    def test_table(self, tmp_path, tiny_adata):
        adata = tiny_adata(9, seed=5)
        adata.var["symbol"], adata.layers["umi"] = adata.var_names, adata.X.copy()
        adata.var_names = [f"gene{i}" for i in range(adata.n_vars)]
        adata.X = adata.X.log1p()
        adata.write_h5ad(tmp_path / "odd.h5ad")
        lines = ["path\tgene_key\tlayer\ttissue\tstudy", "odd.h5ad\tsymbol\tumi\tgut\tSmith 2020", "blood.h5ad\t\t\t\t"]
        (tmp_path / "studies.tsv").write_text("\n".join(lines))
        write_store([tmp_path / "studies.tsv"], tmp_path / "store")
        store = StoreSource(tmp_path / "store")
        tissue, study = (np.array(store.manifest.columns[name])[store.codes(name)] for name in ("tissue", "study"))
        assert set(zip(tissue, study, strict=True)) == {("gut", "Smith 2020"), ("blood", "blood")}

    @pytest.mark.parametrize(
        ("text", "words"), [("file\na", "no column 'path'"), ("path\n", "no line"), ("path\ttissue\n\tblood", "line 2")]
    )
    def test_bad_table(self, tmp_path, text, words):
        (tmp_path / "studies.tsv").write_text(text)
        with pytest.raises(InputError, match=words):
            find_studies([tmp_path / "studies.tsv"])


def test_opens_with_datasets(files, tmp_path):
    datasets = pytest.importorskip("datasets")
    write_store(files, tmp_path / "store", memory_gb=2e-5, shard_bytes=20_000)
    store = StoreSource(tmp_path / "store")
    shards = [str(tmp_path / "store" / shard.file) for shard in store.manifest.shards]
    table = datasets.load_dataset("arrow", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert table.num_rows == 160
    for row in (0, 99, 159):
        mine = store.rows([row])
        assert table[row]["gene_ids"] == mine.counts.indices.tolist()
        assert table[row]["counts"] == mine.counts.data.tolist()
        assert table[row]["study"] == store.codes("study", [row])[0]


def test_more_values_than_an_int_can_count(tmp_path):
    """One shard, listed so often that the store holds more than 2**31 values."""
    from annformer.genes import table_vocab

    n_cells, n_genes = 400, 20_000
    genes = table_vocab().genes[:n_genes]
    x = sp.csr_matrix(np.random.default_rng(0).integers(1, 9, (n_cells, n_genes)).astype(np.float32))
    ad.AnnData(x, var=pd.DataFrame(index=list(genes))).write_h5ad(tmp_path / "deep.h5ad")
    write_store([tmp_path / "deep.h5ad"], tmp_path / "store")
    path = tmp_path / "store" / MANIFEST
    manifest = json.loads(path.read_text())
    times = 2**31 // manifest["n_values"] + 2
    manifest["shards"] *= times
    manifest["n_cells"] *= times
    manifest["n_values"] *= times
    path.write_text(json.dumps(manifest))
    store = StoreSource(tmp_path / "store")
    assert store.lengths.sum(dtype=np.int64) == manifest["n_values"] > 2**31
    last = store.n_obs - 1
    cells = store.rows([last, 0, last - n_cells])
    assert (cells.counts[[0]] != cells.counts[[2]]).nnz == 0
    assert (cells.counts[[0]] != cells.counts[[1]]).nnz > 0
    assert store.names([last]) == store.names([last - n_cells])
