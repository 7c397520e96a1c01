from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml

from annformer import datasets
from annformer.cli import demo as module
from annformer.cli import main
from annformer.scgpt import ScGPT
from annformer.train.config import PretrainConfig

TINY = {"model": {"width": 16, "n_heads": 2, "n_layers": 1, "ff_width": 16}, "train": {"epochs": 1, "cells_per_step": 40}}


def some_cells() -> ad.AnnData:
    """30 cells of each of three types."""
    adata = datasets.load(module.DATASET)
    labels = adata.obs["bulk_labels"].astype(str)
    return adata[np.concatenate([np.flatnonzero(labels == name)[:30] for name in ("Dendritic", "CD19+ B", "CD14+ Monocyte")])].copy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_maps", flat_maps)  # UMAP compiles for ten seconds
        patch.setattr("annformer.evaluate.clustering.find_spec", lambda _: None)  # so does the graph under Leiden
        run = module.make(folder, some_cells(), PretrainConfig.read(TINY, where="test"), command="annformer demo", overwrite=False)
    return run, folder


def flat_maps(adata: ad.AnnData, seed: int) -> None:
    for name in (module.OURS, module.PCA):
        adata.obsm[f"{module.KEYS[name]}_umap"] = adata.obsm[module.KEYS[name]][:, :2]


def test_demo_leaves_five_things_and_nothing_beside_them(made):
    _, folder = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(module.FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_embedded_cells_and_model_belong_together(made):
    run, folder = made
    adata, model = ad.read_h5ad(folder / "embedded.h5ad"), ScGPT.from_pretrained(folder / "model")
    record = adata.uns["annformer"]["X_annformer"]
    assert record["counts"]["where"] == ".raw.X"
    assert record["fingerprint"] == model.fingerprint == run.pretrained.model.fingerprint
    assert np.allclose(np.linalg.norm(adata.obsm["X_annformer"], axis=1), 1, atol=1e-5)
    assert adata.uns["annformer"]["X_untrained"]["fingerprint"] != model.fingerprint


def test_numbers_of_the_page_stand_in_the_table(made):
    run, folder = made
    table = pd.read_csv(folder / "metrics.csv")
    means = table[table.task == "annotation"].groupby(["method", "by", "measure"])["value"].mean()
    html = (folder / "report.html").read_text()
    for method in (module.OURS, module.PCA, module.UNTRAINED):
        assert f"{means[method, 'kNN (k=10)', 'macro_f1']:.3f} ± " in html
    assert set(table[table.task == "held-out expression"].method) == {"gep", "gepc", "gene mean"}
    assert f"{run.pretrained.errors['gene mean']:.1f} when each gene" in html.replace("&#39;", "'")


def test_page_says_what_the_data_are_and_what_it_does_not_show(made):
    html = (made[1] / "report.html").read_text()
    for text in (
        "log-normalised",
        ".raw",
        "not the pretrained model",
        "annformer demo",
        "correlation with",
        datasets.content_hash(made[0].adata),
    ):
        assert text in html


@pytest.mark.parametrize(("difference", "said"), [(0.2, "A is better than B"), (-0.2, "B is better than A"), (0.0, "no clear difference")])
def test_a_verdict_names_the_better_one(difference, said):
    from annformer.cli._demo_page import _compared

    noise = np.array([-0.02, 0.01, 0.0, 0.015, -0.005])
    assert _compared(pd.DataFrame({"A": 0.5 + difference + noise, "B": 0.5}), "A", "B").startswith(said)


def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "compute", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_the_work_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "compute", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "thesis.docx").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not the folder of an earlier demo" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.html").touch()
    assert main(["demo", "--out", str(tmp_path / "old")]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_recipe_file_says_what_the_demo_does():
    path = Path(__file__).parents[2] / "recipes" / "pretrain-tiny.yaml"
    assert PretrainConfig.read(yaml.safe_load(path.read_text()), where="file") == PretrainConfig.read(module.RECIPE, where="demo")


@pytest.mark.slow
def test_whole_demo_from_the_command_line(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "annformer", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    assert re.search(r"PCA, 50 components +0\.8", done.stdout)
    assert str(out / "report.html") in done.stdout
    assert "Traceback" not in done.stderr
    errors = pd.read_csv(out / "metrics.csv").query("task == 'held-out expression'").set_index("method")["value"]
    assert errors["gep"] < errors["gene mean"]
