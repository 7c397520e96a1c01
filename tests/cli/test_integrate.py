"""`annformer integrate`: files, page, stopped and repeated runs."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from annformer.cli import main
from annformer.tasks.integration import BatchIntegrator

WORDS = "integrate cells.h5ad --batch_key batch --label_key cell_type --model model --out out --recipe recipe.yaml --threads 1"
RECIPE = """\
n_genes: 80
anchor: {n_components: 8, n_neighbours: 10}
train: {epochs: 2, tokens_per_step: 2000, tokens_per_forward: 4000, max_length: 30, validations: 2, mode: hide, asked_shares: [0.4]}
"""


@pytest.fixture
def cells(tiny_adata, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = tiny_adata(120)
    cells.write_h5ad("cells.h5ad")
    tiny_model.save_pretrained("model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return cells


def test_what_it_leaves(cells, tmp_path, capsys):
    assert main([*WORDS.split(), "--corrected", "mean"]) == 0
    assert "out/report.html" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "integrated.h5ad", "history.csv", "scores.csv", "model"}
    assert not list(tmp_path.glob(".out*"))
    written = ad.read_h5ad("out/integrated.h5ad")
    assert written.obsm["X_annformer"].shape == (120, 8)
    assert np.array_equal(written.obs_names, cells.obs_names)
    assert written.obsm["annformer_corrected"].shape == (120, 80)
    again = BatchIntegrator.load("out/model", threads=1).transform(cells, copy=True)
    assert np.allclose(again.obsm["X_annformer"], written.obsm["X_annformer"], atol=1e-5)
    assert list(pd.read_csv("out/scores.csv")["method"]) == ["annformer fine-tuned", "PCA HVG"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "annformer integrate cells.h5ad" in page
    assert "annformer compare integrate" in page
    assert "<dt>full card</dt><dd>model/README.md</dd>" in page and (tmp_path / "out" / "model" / "README.md").is_file()
    assert "are known to the fine-tuned model" in page and "of which it was fine-tuned on 80" in page
    settings = page.partition("<details>")[2].partition("<code>")[2].partition("</code>")[0]
    assert "n_genes: 80" in settings and "smoothing: 0.6" in settings, "what the recipe leaves open stands there too"
    assert "<noscript>" in page


def test_an_earlier_result_is_not_overwritten_unasked(cells, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    assert main(WORDS.split()) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").read_text() == "mine"
    assert main([*WORDS.split(), "--overwrite"]) == 0
    assert (tmp_path / "out" / "integrated.h5ad").exists()


def test_a_stopped_run_goes_on(cells, tmp_path, monkeypatch, caplog):
    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BatchIntegrator, "transform", stopped)
        assert main(WORDS.split()) == 2
    assert (tmp_path / ".out.training" / "checkpoints").is_dir() and not (tmp_path / "out").exists()
    (tmp_path / ".out.training" / ".seconds").write_text("5000")
    assert main(WORDS.split()) == 0
    assert any("going on after step" in record.message for record in caplog.records)
    assert not (tmp_path / ".out.training").exists()
    assert re.search(r"<dt>time</dt><dd>5,0\d\d s</dd>", (tmp_path / "out" / "report.html").read_text()), "with what it took before"
