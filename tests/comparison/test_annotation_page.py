from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from annformer.comparison import annotate
from annformer.comparison.annotation_methods import EXPRESSION, OURS
from annformer.comparison.annotation_page import confusions, maps, reliability, types, write_page
from annformer.comparison.calls import CONTROL
from annformer.comparison.table import csv_tables, on_terminal, scores_table
from annotation_callers import quick, table_of
from browser import chromium, measured_on_phone, needs_browser, seen_without_scripts
from comparison_cells import N_CELLS, some_cells

N_TYPED = N_CELLS - 5
N_PLOTS = 1 + 1 + 2 + 1 + 2 + 1
"""Intervals, types, two tables in colours, curve of confidence, pair of maps, map of what is wrong."""


@pytest.fixture(scope="module")
def found(tiny_adata):
    """Ours and two floors with whole batches held out; one more is missing."""
    cells = some_cells(tiny_adata)
    table = table_of(cells, 0.9, {"kNN PCA": 0.5, "logistic regression all genes": 0.7})
    call = table["kNN PCA"].call
    ordinary = lambda *given: dataclasses.replace(call(*given), confidence=np.random.default_rng(0).random(given[1].n_obs))  # noqa: E731
    table["kNN PCA"] = dataclasses.replace(table["kNN PCA"], call=ordinary)
    table["CellTypist"] = dataclasses.replace(table["kNN PCA"], name="CellTypist", missing="pip install 'celltypist'")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return annotate.compare_annotation(
            cells,
            label_key="cell_type",
            batch_key="batch",
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
    scores = found.means().set_index("method")
    for text in (
        f'<p class="note">{found.sentence}</p>',
        f"annformer is worse than {EXPRESSION}, the same without the network",
        f"{N_TYPED} cells of 3 types, every one called when it was held out (whole batches, 5 folds). 2 baselines learned",
        "40 bootstrap draws of whole batches (6 of them)",
        "made 1.44 times as wide",
        "with what it calls each cell as it is",
        "Not run here, and so not beaten either: CellTypist (pip install 'celltypist').",
        f"{scores.loc['kNN PCA', 'macro_f1']:.3f}",
        f"{scores.loc[OURS, 'macro_recall']:.3f}",
        f"The expected calibration error of annformer is {scores.loc[OURS, 'ece']:.3f}",
        f"{found.coverage['coverage'][0]:.3f}",
        "batch 1",
        "The same methods with whole batches held out, and with cells held out at random",
        "5 cells without a type",
        "Types that nobody taught",
        "annformer, 95 %",
        "{:.3f} to {:.3f}".format(*found.novelty_mean.set_index("method").loc[OURS, ["low", "high"]]),
        "The scores are those of cells of batches that are new",
        "mine.h5ad",
        "<pre><code>annformer compare x</code></pre>",
        found.facts.model["fingerprint"],
        *found.facts.definitions.values(),
        "scikit-learn",
    ):
        assert text in html, text


def test_without_batches_there_is_no_gap_and_few_say_so(found, tmp_path):
    alone = found.beside[found.beside["split"] == "random cells"]
    other = dataclasses.replace(found, beside=alone, split="random cells", n_units=None, novelty=found.novelty[:0])
    write_page(other, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "The same methods with whole batches" not in html
    assert "The intervals say what other cells like these would show" in html
    assert "cells of the same batches" in html
    assert "Types that nobody taught" not in html


def test_confusions_are_those_of_ours_and_the_best_floor(found):
    payload = confusions(found).payload
    assert [panel["title"] for panel in payload["panels"]] == [OURS, "logistic regression all genes"]
    counts = pd.DataFrame(payload["panels"][0]["counts"], index=payload["rows"], columns=payload["columns"])
    predicted = found.more_tables["predictions.csv"]
    assert counts.to_numpy().sum() == N_TYPED
    assert counts.loc["B cell", "T cell"] == ((predicted["type"] == "B cell") & (predicted[OURS] == "T cell")).sum()
    shares = np.array(payload["panels"][0]["shares"])
    assert shares.sum(axis=1) == pytest.approx(100, abs=0.1)


def test_called_types_have_the_colours_of_the_true_ones(found):
    both, wrong = maps(found)
    label, called = (both.payload["columns"][n] for n in both.payload["colour_by"])
    assert (label["name"], called["name"]) == ("cell_type", "called")
    assert called["levels"][:3] == label["levels"]
    right = wrong.payload["columns"][0]
    assert right["name"] == "right or wrong"
    n_wrong = sum(code == right["levels"].index("wrong") for code in right["codes"])
    predicted = found.more_tables["predictions.csv"]
    assert n_wrong == (predicted["type"] != predicted[OURS]).sum()


def test_types_without_the_control_the_frequent_first(found):
    payload = types(found).payload
    assert payload["rows"] == found.facts.cells_by.sum(axis=1).sort_values(ascending=False, kind="stable").index.to_list()
    assert [measure["name"] for measure in payload["measures"]] == ["F1", "precision", "recall"]
    methods = [series["name"] for series in payload["measures"][0]["series"]]
    assert methods[0] == OURS
    assert CONTROL not in methods


def test_curves_are_of_methods_whose_confidence_varies(found):
    names = [series["name"] for series in reliability(found).payload["panels"][0]["series"]]
    assert names == ["kNN PCA", "as sure as right"]


def test_scores_of_what_did_not_run_by_itself_have_no_seconds(found):
    table = scores_table(found).set_index("method")
    assert re.fullmatch(r"0\.\d{3} ± 0\.\d{3}", table.loc[OURS, "macro f1"])
    assert table.loc[[EXPRESSION, CONTROL], "seconds"].to_list() == ["-", "-"]
    assert float(table.loc[OURS, "seconds"]) >= 1, "the embedding counts"


def test_terminal_shows_scores_verdicts_and_the_sentence(found):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    for part in on_terminal(found):
        console.print(part)
    text = console.export_text()
    assert "Scores, best macro f1 first" in text
    assert found.sentence in " ".join(text.split())
    assert "not run: CellTypist (pip install 'celltypist')" in text


def test_files_hold_every_number(found, tmp_path):
    tables = csv_tables(found)
    others = ["confusion.csv", "coverage.csv", "novelty.csv", "novelty_mean.csv", "reliability.csv"]
    assert sorted(tables) == sorted([*others, "per_type.csv", "predictions.csv", "scores.csv", "verdicts.csv"])
    for name, table in found.confusions.items():
        long = tables["confusion.csv"]
        of = long[long["method"] == name].set_index(["true", "called"])["cells"]
        assert all(of[true, called] == table.loc[true, called] for true in table.index for called in table.columns)
    assert set(tables["reliability.csv"]["method"]) == set(found.reliability)
    assert len(tables["scores.csv"]) == 2 * (2 + 1) + 2 * 2 + 1
    assert len(tables["per_type.csv"]) == 3 * (5 + 4)
    assert len(tables["verdicts.csv"]) == 2 * 4
    predicted = tables["predictions.csv"]
    assert len(predicted) == N_TYPED
    accuracy = (predicted["type"] == predicted[OURS]).mean()
    first = found.scores[(found.scores["method"] == OURS) & (found.scores["seed"] == 0)]
    assert accuracy == pytest.approx(first["accuracy"].item())


@needs_browser
def test_page_draws_everything_in_a_browser_and_on_a_phone(page, tmp_path):
    drawn = chromium(page, tmp_path / "profile", "--dump-dom")
    assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == N_PLOTS
    width, plots = measured_on_phone(page, tmp_path / "profile")
    assert plots == N_PLOTS
    assert width <= 390, "the page is wider than a phone"


@needs_browser
def test_page_has_pictures_where_scripts_are_off(page, tmp_path):
    assert page.read_text().count('<noscript><img src="data:image/png;base64,') == 6
    image = seen_without_scripts(page, tmp_path / "profile")
    coloured = (image.max(axis=2) - image.min(axis=2) > 0.3).sum()
    assert coloured > 5_000, "no picture is to be seen"


def test_settings_are_folded_away(found, page, tmp_path):
    assert "<details>" not in page.read_text(), "methods of one's own have none that we know"
    write_page(dataclasses.replace(found, facts=dataclasses.replace(found.facts, recipe="n_genes: 80")), tmp_path / "report.html")
    assert "<pre><code>n_genes: 80</code></pre></details>" in (tmp_path / "report.html").read_text()
