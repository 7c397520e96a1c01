from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from annformer.comparison import integrate
from annformer.comparison.page import curves, intervals, maps, types, write_page
from annformer.comparison.table import csv_tables, obsm_key, on_terminal, scores_table
from browser import chromium, measured_on_phone, needs_browser, seen_without_scripts
from comparison_cells import N_CELLS, quick, some_cells, table_of


@pytest.fixture(scope="module")
def found(tiny_adata, tmp_path_factory, tiny_vocab):
    """Two trained methods and two floors on cells of three batches; one more is missing."""
    cells = some_cells(tiny_adata, n_batches=3)
    table = table_of(cells, 8.0, {"PCA HVG": 2.0, "Harmony HVG": 3.0})
    table[integrate.SCRATCH] = dataclasses.replace(table[integrate.TUNED], name=integrate.SCRATCH)
    table["scVI HVG"] = dataclasses.replace(table["PCA HVG"], name="scVI HVG", missing="pip install 'annformer[baselines]'")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return integrate.compare_integration(
            cells,
            batch_key="batch",
            label_key="cell_type",
            table=table,
            seeds=(0, 1),
            n_draws=40,
            name="mine.h5ad",
            command="annformer compare x",
        )


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(found, path)
    return path


def test_page_says_what_was_found(found, page):
    html = page.read_text().replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"')
    means = found.means().set_index("method")
    for text in (
        f'<p class="note">{found.sentence}</p>',
        "annformer fine-tuned is no better and no worse than annformer from scratch, the same training from random weights (+0.000, ",
        "180 cells of 3 batches, 3 types. 2 baselines got the same cells",
        "Not run here, and so not beaten either: scVI HVG (pip install 'annformer[baselines]').",
        f"{means.loc['Harmony HVG', 'overall']:.3f}",
        f"{means.loc['Harmony HVG', 'graph_connectivity']:.3f}",
        "40 bootstrap draws of cells within their type",
        "There are too few batches to draw them",
        "mine.h5ad",
        "<pre><code>annformer compare x</code></pre>",
        "gene names",
        found.facts.model["fingerprint"],
        *found.facts.definitions.values(),
        "scib-metrics",
    ):
        assert text in html, text


def test_ours_comes_first_on_the_maps_and_the_control_is_there(found):
    payload = maps(found).payload
    titles = [panel["title"] for panel in payload["panels"]]
    assert titles[0] == found.ours
    assert set(titles) == {found.ours, integrate.SCRATCH, "PCA HVG", "Harmony HVG", "shuffled cells"}
    assert [payload["columns"][n]["name"] for n in payload["colour_by"]] == ["batch", "cell_type"]
    assert [column["name"] for column in payload["columns"]] == ["batch", "cell_type", "depth"]
    assert payload["hover"][1] == f"cell1: {found.maps.columns['cell_type'].iloc[1]}, batch 1"


def test_intervals_are_those_of_the_verdicts(found):
    payload = intervals(found).payload
    assert [measure["name"] for measure in payload["measures"]] == ["overall", "avg_bio", "avg_batch"]
    row = found.verdicts.set_index(["score", "other"]).loc[("avg_bio", "PCA HVG")]
    series = payload["measures"][1]["series"][0]
    at = payload["rows"].index("PCA HVG")
    assert (series["x"][at], series["low"][at], series["high"][at]) == pytest.approx(tuple(row[["difference", "low", "high"]]), abs=1e-3)


def test_types_without_the_control_the_frequent_first(found):
    payload = types(found).payload
    counts = found.facts.cells_by.drop("unknown").sum(axis=1).sort_values(ascending=False)
    assert payload["rows"] == counts.index.to_list()
    methods = [series["name"] for series in payload["measures"][0]["series"]]
    assert methods[0] == found.ours
    assert "shuffled cells" not in methods


def test_curves_show_every_loss_of_the_first_seed(found):
    panels = {panel["title"]: [series["name"] for series in panel["series"]] for panel in curves(found).payload["panels"]}
    both = [f"{name}, {cells}" for name in (integrate.TUNED, integrate.SCRATCH) for cells in ("learned from", "held back")]
    assert panels == {"gep": both, "dar": [name for name in both if name.endswith("held back")]}


def test_spread_over_seeds_is_shown_where_there_are_several(found):
    table = scores_table(found).set_index("method")
    assert re.fullmatch(r"0\.\d{3} ± 0\.\d{3}", table.loc[found.ours, "overall"])
    assert re.fullmatch(r"0\.\d{3}", table.loc["PCA HVG", "overall"])
    assert table.loc["shuffled cells", "seconds"] == "-"


def test_terminal_shows_scores_verdicts_and_the_sentence(found):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    for part in on_terminal(found):
        console.print(part)
    text = console.export_text()
    assert text.count("beats") + text.count("ties") + text.count("loses") >= 3
    assert found.sentence in " ".join(text.split())
    assert "not run: scVI HVG (pip install 'annformer[baselines]')" in text


def test_files_hold_every_number(found, tmp_path):
    tables = csv_tables(found)
    assert list(tables) == ["scores.csv", "verdicts.csv", "per_type.csv"]
    tables["scores.csv"].to_csv(tmp_path / "scores.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv"), found.scores.reset_index(drop=True))
    assert len(tables["scores.csv"]) == 2 + 2 + 1 + 1 + 1
    assert len(tables["verdicts.csv"]) == 3 * 4
    assert len(tables["per_type.csv"]) == 5 * 3


def test_places_in_obsm(found):
    assert obsm_key(found.ours, found.ours) == "X_annformer"
    assert obsm_key("scVI HVG, 2 layers, 30 latent", found.ours) == "X_scvi_hvg_2_layers_30_latent"
    assert all(np.shape(embedding)[0] == N_CELLS for embedding in found.embeddings.values())


@needs_browser
def test_page_draws_everything_in_a_browser_and_on_a_phone(found, page, tmp_path):
    drawn = chromium(page, tmp_path / "profile", "--dump-dom")
    n_plots = 2 * len(found.embeddings) + 1 + 1 + 2
    assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == n_plots
    width, plots = measured_on_phone(page, tmp_path / "profile")
    assert plots == n_plots
    assert width <= 390, "the page is wider than a phone"


@needs_browser
def test_page_has_pictures_where_scripts_are_off(page, tmp_path):
    html = page.read_text()
    assert html.count('<noscript><img src="data:image/png;base64,') == 4
    image = seen_without_scripts(page, tmp_path / "profile")
    coloured = (image.max(axis=2) - image.min(axis=2) > 0.3).sum()
    assert coloured > 5_000, "no picture is to be seen"


def test_settings_are_folded_away(found, page, tmp_path):
    assert "<details>" not in page.read_text(), "methods of one's own have none that we know"
    write_page(dataclasses.replace(found, facts=dataclasses.replace(found.facts, recipe="n_genes: 80")), tmp_path / "report.html")
    assert "<pre><code>n_genes: 80</code></pre></details>" in (tmp_path / "report.html").read_text()
