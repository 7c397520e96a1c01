"""Cells of a TileDB-SOMA experiment and of the Census: those that were asked for, as they are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from annformer.cli import main
from annformer.data import CellSource, census
from annformer.data import store_writer as writer
from annformer.data.census import SomaStudy
from annformer.data.find_studies import find_studies
from annformer.data.store import MANIFEST, StoreSource
from annformer.data.store_plan import LABELS
from annformer.data.store_writer import write_store
from annformer.data.studies import LabelCodes, Study
from annformer.errors import InputError
from soma_experiments import replace_obs, write_experiment, write_in_collection

tiledbsoma = pytest.importorskip("tiledbsoma")

N = 300
BLOOD = "tissue_general in ['blood', 'bone marrow'] and disease == 'normal'"
EVERY = "is_primary_data == True or is_primary_data == False"


def census_cells(tiny_adata) -> ad.AnnData:
    """Cells with the columns of the Census; some tissues and diseases, some cells that are not primary."""
    adata, rng = tiny_adata(N, seed=9), np.random.default_rng(0)
    adata.var = pd.DataFrame(
        {"feature_id": [f"ENSG{i:011d}" for i in range(adata.n_vars)], "feature_name": adata.var_names}, index=adata.var_names
    )
    tissue = rng.choice(["blood", "bone marrow", "lung"], N)
    columns = {
        "tissue_general": tissue,
        "tissue": np.where(tissue == "lung", "left lung", tissue),
        "disease": rng.choice(["normal", "COVID-19"], N, p=[0.8, 0.2]),
        "assay": rng.choice(["10x 3' v3", "Smart-seq2"], N),
        "dataset_id": np.sort(rng.choice(["d-one", "d-two", "d-three"], N)),
        "donor_id": rng.choice(["p1", "p2"], N),
    }
    for name, values in columns.items():
        adata.obs[name] = pd.Categorical(values)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)  # text of which SOMA keeps every value
    adata.obs["is_primary_data"] = rng.random(N) < 0.8
    adata.obs = adata.obs.drop(columns="batch")
    return adata


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_adata) -> tuple[ad.AnnData, Path]:
    """A copy of the Census: census_data/homo_sapiens/ms/RNA/X/raw."""
    folder, adata = tmp_path_factory.mktemp("soma") / "census", census_cells(tiny_adata)
    human = write_in_collection(adata, folder)
    return adata, human


@pytest.fixture
def adata(built) -> ad.AnnData:
    return built[0]


@pytest.fixture
def human(built) -> Path:
    return built[1]


@pytest.fixture
def release(monkeypatch, human) -> None:
    """The release directory of the Census, whose newest stable release is the copy above."""
    cellxgene_census = pytest.importorskip("cellxgene_census")
    soma = {"uri": f"{human.parents[1].as_uri()}/", "s3_region": "us-west-2"}

    def description(version: str) -> dict:
        if version not in ("stable", "2025-01-30"):
            raise ValueError(version)
        return {"release_build": "2025-01-30", "soma": soma}

    monkeypatch.setattr(cellxgene_census, "get_census_version_description", description)
    census._release.cache_clear()


def wanted(adata: ad.AnnData, *, primary: bool = True) -> np.ndarray:
    obs = adata.obs
    chosen = obs.tissue_general.isin(["blood", "bone marrow"]) & (obs.disease == "normal")
    return np.flatnonzero(chosen & obs.is_primary_data if primary else chosen)


def counts_in(store: StoreSource, adata: ad.AnnData) -> np.ndarray:
    """Counts of the store's cells over the columns of `adata` that it knows, by the numbers of the cells."""
    cells = store.rows(np.arange(store.n_obs))
    dense = cells.counts.toarray()[np.argsort(store.codes("row"))]
    known = [gene for gene in adata.var_names if gene in store.vocab.genes]
    return dense[:, [store.vocab.tokens.index(gene) for gene in known]]


class TestStudy:
    def test_cells_are_those_of_the_filter(self, adata, human, tiny_vocab):
        cells = SomaStudy(path=str(human), obs_filter=BLOOD).open()
        assert isinstance(cells, CellSource)
        rows = wanted(adata)
        assert cells.numbers(np.arange(cells.n_obs)).tolist() == rows.tolist()
        assert cells.counts.where == "layers['raw']"
        for batch in cells.batches(50, vocab=tiny_vocab):
            there = adata[rows[batch.rows], [tiny_vocab.tokens[i] for i in batch.gene_ids]].X
            assert (batch.counts != there).nnz == 0
        cells.close()

    def test_rows_in_any_order_and_from_start(self, adata, human, tiny_vocab, monkeypatch):
        monkeypatch.setattr(census, "BLOCK_VALUES", 2_000)
        cells = SomaStudy(path=str(human)).open()
        rows, place = np.flatnonzero(adata.obs.is_primary_data), np.array([200, 3, 4, 5, 0, 100])
        (batch,) = cells.batches(9, vocab=tiny_vocab, rows=place)
        genes = [tiny_vocab.tokens[i] for i in batch.gene_ids]
        assert (batch.counts != adata[rows[place], genes].X).nnz == 0
        parts = list(cells.batches(7, vocab=tiny_vocab, start=100))
        assert cells.reader.rows_at_once < 50
        assert np.concatenate([part.rows for part in parts]).tolist() == list(range(100, len(rows)))
        assert (sp.vstack([part.counts for part in parts]) != adata[rows[100:], genes].X).nnz == 0

    def test_primary_cells_only_unless_the_filter_says_so(self, adata, human):
        both = f"({BLOOD}) and ({EVERY})"
        for condition, primary in ((BLOOD, True), (both, False)):
            cells = SomaStudy(path=str(human), obs_filter=condition).open()
            assert cells.n_obs == len(wanted(adata, primary=primary))
        either = SomaStudy(path=str(human), obs_filter="tissue_general == 'lung' or disease == 'normal'").open()
        assert either.n_obs == (adata.obs.is_primary_data & ((adata.obs.tissue_general == "lung") | (adata.obs.disease == "normal"))).sum()

    def test_labels(self, adata, human):
        study = SomaStudy(path=str(human), obs_filter=BLOOD, labels={"assay": "mine"})
        cells, obs = study.open(), adata.obs.iloc[wanted(adata)]
        for column, there in (("study", "dataset_id"), ("batch", "donor_id"), ("tissue", "tissue"), ("cell_type", "cell_type")):
            labels = LabelCodes()
            codes = labels.of_study(study, cells, column)
            assert np.array(labels.categories)[codes].tolist() == obs[there].tolist()
            assert labels.categories == sorted(set(obs[there]))
            assert codes.dtype == np.uint8
        labels = LabelCodes()
        assert labels.of_study(study, cells, "assay").tolist() == [0] * cells.n_obs
        assert labels.categories == ["mine"]

    def test_a_column_of_obs_wins_over_what_stands_for_it(self, adata, tmp_path):
        adata = adata.copy()
        adata.obs["study"] = "own"
        cells = SomaStudy(path=str(write_experiment(adata, tmp_path / "exp"))).open()
        assert set(cells.obs.column("study")) == {"own"}

    def test_pages_in_any_order(self, adata, human, monkeypatch):
        """Small buffers give many pages; text comes without the list of all its values."""
        monkeypatch.setattr(census, "CONFIG", {"soma.init_buffer_bytes": "512"})
        cells = SomaStudy(path=str(human), obs_filter=BLOOD).open()
        rows = wanted(adata)
        assert cells.n_obs == len(rows)
        assert cells.obs.column("cell_type").astype(str).tolist() == adata.obs["cell_type"].iloc[rows].tolist()
        stored = cells.reader.read(0, len(rows))
        got = sp.csr_array((stored.data, stored.indices, stored.indptr), shape=(len(rows), adata.n_vars))
        assert (got != adata.X[rows]).nnz == 0

    def test_genes_by_another_column(self, human, tiny_vocab):
        with pytest.raises(InputError, match="feature_name"):
            SomaStudy(path=str(human), gene_key="feature_id").open().match(tiny_vocab)

    def test_other_layer_and_measurement(self, adata, tmp_path):
        path = str(write_experiment(adata, tmp_path / "exp", layer="data"))
        assert SomaStudy(path=path, layer="data").open().counts.kind == "counts"
        with pytest.raises(InputError, match="no measurement 'ADT'"):
            SomaStudy(path=path, layer="data", measurement="ADT").open()

    def test_identity_follows_the_question_and_the_data(self, adata, human, tmp_path):
        whole, some = SomaStudy(path=str(human)), SomaStudy(path=str(human), obs_filter=BLOOD)
        assert whole.identity() == SomaStudy(path=str(human)).identity() != some.identity()
        assert some.record()["obs_filter"] == f"({BLOOD}) and is_primary_data == True"
        path = write_experiment(adata[:200].copy(), tmp_path / "exp")
        before = SomaStudy(path=str(path)).identity()
        replace_obs(path, adata.obs[:200].assign(is_primary_data=True, obs_id=adata.obs_names[:200]))
        assert SomaStudy(path=str(path)).identity()["taken"] != before["taken"]


class TestStore:
    def test_a_mix_of_kinds(self, adata, human, tmp_path, tiny_adata):
        tiny_adata(20, seed=1).write_h5ad(tmp_path / "a.h5ad")
        studies = find_studies([tmp_path / "a.h5ad", human], obs_filter=BLOOD)
        manifest = write_store(studies, tmp_path / "store")
        rows = wanted(adata)
        assert [(s.file, s.n_cells, s.n_kept) for s in manifest.sources] == [("a.h5ad", 20, 20), (str(human), len(rows), len(rows))]
        assert manifest.sources[1].obs_filter == f"({BLOOD}) and is_primary_data == True"
        assert set(manifest.columns["study"]) == {"a", *adata.obs.dataset_id.iloc[rows]}
        store = StoreSource(tmp_path / "store")
        from_soma = np.flatnonzero(store.codes("source") == 1)
        assert sorted(store.codes("row", from_soma).tolist()) == rows.tolist(), "row is soma_joinid"
        for column, there in (("tissue", "tissue"), ("batch", "donor_id")):
            labels = np.array(manifest.columns[column])[store.codes(column, from_soma)]
            assert labels.tolist() == adata.obs[there].iloc[store.codes("row", from_soma)].tolist()

    @pytest.mark.usefixtures("release")
    def test_census_by_name(self, adata, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        words = ["prepare", "census:stable", "--obs_filter", BLOOD + " and assay == 'Smart-seq2'", "--out", "store"]
        assert main(words) == 0
        rows = [row for row in wanted(adata) if adata.obs.assay.iloc[row] == "Smart-seq2"]
        assert f"{len(rows)} of {len(rows)} cells" in capsys.readouterr().out
        store = StoreSource("store")
        assert store.manifest.sources[0].file == "census:2025-01-30/homo_sapiens", "the release is named, not what is stable today"
        known = [gene for gene in adata.var_names if gene in store.vocab.genes]
        assert (counts_in(store, adata) == adata[rows, known].X.toarray()).all()
        assert list(store.manifest.columns) == list(LABELS)

    def test_in_a_table_of_studies(self, human, tmp_path, tiny_adata):
        tiny_adata(20, seed=1).write_h5ad(tmp_path / "a.h5ad")
        lines = [f"{human.as_uri()}\ttissue_general == 'lung'\tmine", "a.h5ad\t\t"]
        (tmp_path / "studies.tsv").write_text("\n".join(["path\tobs_filter\tassay", *lines]))
        soma, file = find_studies([tmp_path / "studies.tsv"], obs_filter=BLOOD)
        assert isinstance(soma, SomaStudy)
        assert (soma.obs_filter, soma.labels) == ("tissue_general == 'lung'", {"assay": "mine"})
        assert type(file) is Study
        (tmp_path / "studies.tsv").write_text("path\tobs_filter\na.h5ad\ttissue == 'lung'\n")
        with pytest.raises(InputError, match="obs_filter"):
            find_studies([tmp_path / "studies.tsv"])

    def test_found_in_folders(self, human):
        assert [type(study) for study in find_studies([human.parents[2] / "census" / "census_data" / "homo_sapiens"])] == [SomaStudy]
        assert [Path(study.path).name for study in find_studies([human.parents[2]])] == ["census"]

    @pytest.mark.parametrize("stop_at", [2, 7])
    def test_stopped_run_ends_with_the_same_bytes(self, human, tmp_path, monkeypatch, stop_at):
        options = {"memory_gb": 2e-5, "shard_bytes": 20_000}
        monkeypatch.setattr(writer, "CELLS_PER_READ", 16)
        monkeypatch.setattr(census, "BLOCK_VALUES", 1_500)
        whole = write_store(find_studies([human], obs_filter=BLOOD), tmp_path / "whole", **options)
        calls, inner = 0, census._ExperimentRows.read

        def read(self, start: int, stop: int):
            nonlocal calls
            calls += 1
            if calls == stop_at + 2:  # the first two are samples
                msg = "S3: connection reset"
                raise tiledbsoma.SOMAError(msg)
            return inner(self, start, stop)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="connection reset"):
            patch.setattr(census._ExperimentRows, "read", read)
            write_store(find_studies([human], obs_filter=BLOOD), tmp_path / "store", **options)
        assert (tmp_path / "store.partial").is_dir(), "a connection that breaks does not cost the work"
        with pytest.raises(InputError, match="other studies"):
            write_store(find_studies([human], obs_filter="tissue == 'left lung'"), tmp_path / "store", resume=True, **options)
        write_store(find_studies([human], obs_filter=BLOOD), tmp_path / "store", resume=True, **options)
        manifests = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("whole", "store")]
        assert manifests[0] == manifests[1]
        assert len(whole.shards) > 3

    def test_cells_of_an_experiment_are_kept_out(self, adata, human, tmp_path):
        adata[:, adata.var_names].copy().write_h5ad(tmp_path / "a.h5ad")
        held = SomaStudy(path=str(human), obs_filter=f"tissue_general == 'lung' and ({EVERY})")
        manifest = write_store([tmp_path / "a.h5ad"], tmp_path / "store", exclude=[held])
        assert manifest.sources[0].n_excluded == manifest.held_out[0].n_found == (adata.obs.tissue_general == "lung").sum()


class TestMistakes:
    @pytest.mark.parametrize(
        ("condition", "words"),
        [
            ("tissue ==", ["tissue ==", "cannot be used", "tissue_general"]),
            ("tisue == 'lung'", ["tisue", "does not exist", "tissue_general, tissue, disease"]),
            ("tissue == lung", ["tissue == lung", "quote"]),
            ("tissue == 'Lung'", ["no cell", "fulfils", "'Lung'"]),
        ],
    )
    def test_filter(self, human, condition, words):
        with pytest.raises(InputError) as error:
            SomaStudy(path=str(human), obs_filter=condition).open()
        for word in words:
            assert word in str(error.value)

    def test_layer(self, adata, tmp_path):
        with pytest.raises(InputError, match=r"no layer 'raw'.\n.*'data'"):
            SomaStudy(path=str(write_experiment(adata, tmp_path / "exp", layer="data"))).open()

    def test_negative_value_is_named(self, adata, tmp_path, tiny_vocab):
        adata, dense = adata.copy(), adata.X.toarray()
        dense[7, 5] = -2
        adata.X = sp.csr_matrix(dense)
        path = write_experiment(adata, tmp_path / "exp")
        with pytest.raises(InputError, match=rf"1 negative values .* cell '7', gene '{adata.var_names[5]}'"):
            list(SomaStudy(path=str(path), obs_filter=EVERY).open().batches(64, vocab=tiny_vocab))

    def test_places(self, human, tmp_path):
        for path, words in (
            (f"{tmp_path.as_uri()}/nowhere", "no TileDB-SOMA experiment"),
            (str(human.parent), r"SOMA Collection, not an experiment; it holds homo_sapiens"),
            (str(human / "obs"), "no cells"),
        ):
            with pytest.raises(InputError, match=words):
                find_studies([path])[0].open()

    @pytest.mark.usefixtures("release")
    def test_release(self):
        with pytest.raises(InputError, match="no release '2024-13-01'"):
            SomaStudy(path="census:2024-13-01").open()
        with pytest.raises(InputError, match="no TileDB-SOMA experiment at census:2025-01-30/mus_musculus"):
            SomaStudy(path="census:stable/mus_musculus").open()

    def test_no_connection(self, monkeypatch):
        cellxgene_census = pytest.importorskip("cellxgene_census")

        def refuse(version: str) -> None:
            raise ConnectionError

        monkeypatch.setattr(cellxgene_census, "get_census_version_description", refuse)
        census._release.cache_clear()
        with pytest.raises(InputError, match="a connection to the internet"):
            SomaStudy(path="census:2025-01-30").open()

    def test_package_that_is_missing(self, human, monkeypatch):
        monkeypatch.setitem(sys.modules, "tiledbsoma", None)
        with pytest.raises(InputError, match=r'pip install "annformer\[census\]"'):
            SomaStudy(path=str(human)).open()

    def test_filter_without_an_experiment(self, tmp_path, tiny_adata):
        tiny_adata(20).write_h5ad(tmp_path / "a.h5ad")
        with pytest.raises(InputError, match="no input is a SOMA experiment"):
            find_studies([tmp_path / "a.h5ad"], obs_filter=BLOOD)
