"""What cannot be made into a store is refused in words; where studies are found."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from annformer.data.find_studies import find_studies, study_names
from annformer.data.store import StoreSource
from annformer.data.store_writer import write_store
from annformer.errors import InputError
from store_cells import write_mtx


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
        store = StoreSource(tmp_path / "store")
        sums = np.asarray(store.rows(np.arange(store.n_obs)).counts.sum(axis=1)).reshape(-1)
        of = store.codes("source")
        assert np.allclose(np.sort(sums[of == 0]), np.sort(sums[of == 1]), rtol=1e-4)  # logarithms are undone

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
        write_mtx(tiny_adata(5), tmp_path / "more" / "patient1" / "p1_filtered_feature_bc_matrix")
        write_mtx(tiny_adata(7), tmp_path / "more" / "patient1" / "p1_raw_feature_bc_matrix")  # the same cells and empty droplets
        write_mtx(tiny_adata(7), tmp_path / "more" / "patient2" / "raw_feature_bc_matrix")  # all there is
        names = study_names(find_studies([tmp_path / "more"]))
        assert "p1_filtered_feature_bc_matrix" in names and "p1_raw_feature_bc_matrix" not in names
        assert "raw_feature_bc_matrix" in names
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
