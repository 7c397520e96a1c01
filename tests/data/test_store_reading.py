"""Reading a store: another vocabulary, which genes were measured, damage, size."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annformer.data import AnnDataSource
from annformer.data.store import MANIFEST, StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from annformer.inference import encode_cells, estimate
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.vocab import GeneVocab
from store_cells import cells_of, content


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

    def test_genes_that_are_left_out_leave_the_others_as_they_are(self, store):
        every = store.rows([9, 4, 150])
        vocab = GeneVocab(store.vocab.tokens, store.vocab.genes[::3])
        some = store.rows([9, 4, 150], vocab=vocab)
        kept = np.isin(every.gene_ids, some.gene_ids)
        assert 0 < kept.sum() == len(some.gene_ids) < len(kept)
        assert (some.counts != every.counts[:, np.flatnonzero(kept)]).nnz == 0
        assert some.counts.nnz < every.counts.nnz

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

    def test_a_changed_gene_name_is_found(self, store):
        file = store / "vocab.json"
        text = file.read_text(encoding="utf-8")
        gene = StoreSource(store).vocab.genes[0]
        file.write_text(text.replace(f'"{gene}"', f'"{gene[:-1]}X"'), encoding="utf-8")
        with pytest.raises(InputError, match=r"are not what was written: vocab\.json"):
            StoreSource(store).verify()

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
