from __future__ import annotations

import re
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from annformer import checkpoints, datasets
from annformer.cli import _demo_page as page
from annformer.cli import demo as module
from annformer.cli import main
from annformer.scgpt import DEFAULT_MODEL, ModelFolderConfig, ScGPT
from annformer.vocab import GeneVocab

OURS = "stand-in"
CARD = f"# {OURS}\n\n**It predicts nothing**: its weights are\nrandom.\n\n## Data\n"


def some_cells() -> ad.AnnData:
    """30 cells of each of three types."""
    adata = datasets.load(module.DATASET)
    labels = adata.obs["bulk_labels"].astype(str)
    return adata[np.concatenate([np.flatnonzero(labels == name)[:30] for name in ("Dendritic", "CD19+ B", "CD14+ Monocyte")])].copy()


def save_model(folder, name: str, genes) -> ScGPT:
    """A small network of random weights, 20 of whose genes are marked as untrained."""
    vocab = GeneVocab(tuple(genes), tuple(genes[:20])).with_specials()
    network = {"vocab_size": len(vocab), "width": 16, "n_heads": 2, "n_layers": 1, "ff_width": 16}
    made = {"name": name, "cells": {"trained on": 1000}, "held_out_squared_error": {"gep": 140.22, "gene mean": 160.0}}
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = ScGPT(ModelFolderConfig.model_validate({"model": network, "provenance": made}), vocab)
    model.save_pretrained(folder, card=CARD)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    cells = some_cells()
    model = save_model(folder / "model", OURS, cells.raw.var_names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_maps", flat_maps)  # UMAP compiles for ten seconds
        patch.setattr("annformer.evaluate.clustering.find_spec", lambda _: None)  # so does the graph under Leiden
        patch.setattr(module, "SPLITS", (0, 1))
        run = module.make(folder / "out" / "demo", cells, folder / "model", seed=0, command="annformer demo --seed 0", overwrite=False)
    return run, folder / "out" / "demo", model


def flat_maps(adata: ad.AnnData, keys: list[str], seed: int) -> None:
    for key in keys:
        adata.obsm[f"{key}_umap"] = adata.obsm[key][:, :2]


def test_demo_leaves_its_files_and_nothing_beside_them(made):
    _, folder, _ = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(module.FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]


def test_the_model_is_used_as_it_is(made):
    _, folder, model = made
    adata = ad.read_h5ad(folder / "embedded.h5ad")
    record = adata.uns["annformer"]["X_annformer"]
    assert record["counts"]["where"] == ".raw.X"
    assert (record["model"], record["fingerprint"]) == (OURS, model.fingerprint)
    assert record["genes"]["n_untrained"] == 20
    assert np.allclose(np.linalg.norm(adata.obsm["X_annformer"], axis=1), 1, atol=1e-5)
    untrained = adata.uns["annformer"]["X_untrained"]
    assert untrained["fingerprint"] != model.fingerprint
    assert untrained["settings"] == record["settings"]
    assert adata.obsm["X_untrained"].shape == adata.obsm["X_annformer"].shape
    assert not np.allclose(adata.obsm["X_pca_of_raw"], adata.obsm["X_pca_of_scaled"])


def test_numbers_of_the_page_stand_in_the_table(made):
    run, folder, _ = made
    table = pd.read_csv(folder / "metrics.csv")
    means = table[table.task == "annotation"].groupby(["method", "by", "measure"])["value"].mean()
    html = (folder / "report.html").read_text()
    for method in (OURS, module.PCA, module.SCALED, module.UNTRAINED):
        assert f"{means[method, 'kNN (k=10)', 'macro_f1']:.3f} ± " in html
    bio = table[table.measure == "avg_bio"].set_index("method")["value"]
    assert f"(AvgBIO): {bio[OURS]:.3f} for {OURS}, " in html
    assert set(table.task) == {"annotation", "clustering"}
    assert set(run.keys) == set(bio.index)


def test_page_says_what_the_data_are_and_what_it_does_not_show(made):
    html = (made[1] / "report.html").read_text().replace("&#39;", "'")
    for text in (
        "Verdict: held against PCA",
        "Only 765 genes are in this data set, and stand-in has learned 745; 745 are read",
        "20 columns are genes that the model has not learned: left out",
        "It predicts nothing: its weights are random.",
        "gep 140.2, gene mean 160.0",
        "nothing was trained for this page",
        "log-normalised",
        ".raw",
        "annformer demo --seed 0",
        "correlation with",
        datasets.content_hash(made[0].adata),
    ):
        assert text in html
    assert "same donor" not in html


def test_what_the_shipped_model_has_seen_is_said(made):
    run, _, _ = made
    named = ScGPT(run.model.config.with_(provenance={"name": DEFAULT_MODEL}), run.model.vocab)
    assert any("frozen blood cells of the same donor" in text for text in page._caveats(module.Run(**(vars(run) | {"model": named}))))


NOISE = np.array([-0.02, 0.01, 0.0, 0.015, -0.005])


@pytest.mark.parametrize(("difference", "said"), [(0.2, "A is better than B"), (-0.2, "B is better than A"), (0.0, "no clear difference")])
def test_a_verdict_names_the_better_one(difference, said):
    scores = pd.DataFrame({"A": 0.5 + difference + NOISE, "B": 0.5})
    assert page._compared(scores, "A", "B").startswith(said)


def test_equal_scores_are_no_difference():
    assert page.verdict(pd.DataFrame({"A": 0.5 + NOISE, "B": 0.5 + NOISE}), "A", "B") == "no clear difference"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"x": "better", "y": "better", "z": "worse"}, "better results by x and y; worse results by z. For these cells: use A."),
        ({"x": "worse", "y": "worse", "z": "worse"}, "worse results by x, y and z. For these cells: use PCA."),
        (
            {"x": "better", "y": "no clear difference", "z": "worse"},
            "; no clear difference by y. For these cells: neither is the clear choice.",
        ),
    ],
)
def test_the_verdict_in_one_sentence(found, words):
    assert page._in_one_sentence("A", found).endswith(words)


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


def test_words_reach_the_work(tmp_path, monkeypatch, capsys):
    asked = []

    def compute(adata, source, **options):
        asked.append((adata.n_obs, source, options["seed"], options["command"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compute", compute)
    main(["demo", "--out", str(tmp_path / "out")])
    main(["demo", "--out", str(tmp_path / "out"), "--model", "mine", "--seed", "3"])
    again = f"annformer demo --out {tmp_path / 'out'} --model"
    assert asked == [(700, DEFAULT_MODEL, 0, f"{again} {DEFAULT_MODEL} --seed 0"), (700, "mine", 3, f"{again} mine --seed 3")]


@pytest.mark.slow
def test_whole_demo_from_the_command_line(tmp_path):
    """With the model that ships: it must at least be better than its own random start."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "annformer", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    assert re.search(r"PCA, 50 components +0\.8", done.stdout)
    assert str(out / "report.html") in done.stdout
    assert "Traceback" not in done.stderr
    assert checkpoints.shipped(DEFAULT_MODEL).is_dir()
    bio = pd.read_csv(out / "metrics.csv").query("measure == 'avg_bio'").set_index("method")["value"]
    assert bio[DEFAULT_MODEL] > bio[module.UNTRAINED] + page.SAME
