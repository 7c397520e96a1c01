from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from annformer.report import (
    Bullets,
    Code,
    Facts,
    Folded,
    Note,
    Page,
    Table,
    Text,
    dot_figure,
    heat_figure,
    line_figure,
    line_panels,
    require_packages,
    scatter_figure,
)
from browser import chromium, measured_on_phone, needs_browser, told_on_phone

HOSTILE = "</script><script>document.title = 'stolen'</script>"


def make_page() -> Page:
    rng = np.random.default_rng(0)
    columns = pd.DataFrame(
        {
            "label": pd.Categorical(["B", "T", HOSTILE] * 10),
            "depth": np.r_[np.nan, rng.random(29)],
            "lane": rng.integers(0, 2, 30).astype(bool),
        },
        index=[f"cell{i}" for i in range(30)],
    )
    maps = scatter_figure({"ours": rng.normal(size=(30, 2)), "PCA": rng.normal(size=(30, 2))}, columns, caption="Two maps.")
    curve = line_figure(
        {"training": ([0, 1, 2], [3.0, 2.0, float("nan")]), "mean": ([0, 2], [2.5, 2.5])}, x="step", y="error", caption="Error."
    )
    scores = pd.DataFrame({"method": ["ours", "PCA <x>"], "accuracy": [0.81234, float("nan")], "F1": ["0.7 ± 0.1", "0.8 ± 0.1"]})
    page = Page("A <title>", "What it is.").add("Maps", Note("PCA is better."), maps).add("Training", curve)
    return page.add(
        "Numbers",
        Text("1 < 2"),
        Table(scores, "Scores.", bold=[1]),
        Bullets(["one"]),
        Facts({"cells": 30}),
        Code("annformer demo"),
        Folded("Settings", "a: <1>"),
    )


@pytest.fixture(scope="module")
def html() -> str:
    return make_page().html()


class Elements(HTMLParser):
    """Start tags with attributes, and the text of every element by tag; checks that tags close."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_page_is_well_formed_and_loads_nothing(html):
    page = Elements(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert {"link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    style = "".join(page.text["style"])
    assert "url(" not in style
    assert "@import" not in style
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)


def test_every_figure_has_a_still_image_for_readers_without_scripts(html):
    images = re.findall(r'<noscript><img src="data:image/png;base64,([^"]{1000,})" alt="([^"]+)"></noscript>', html)
    assert len(images) == 2
    assert "coloured by label" in images[0][1]


def test_plotly_is_inlined_once_and_only_when_needed(html):
    assert len(re.findall(r"plotly\.js v\d", html)) == 1
    assert len(Page("No figure").add("Text", Text("nothing to draw")).html()) < 20_000


def test_text_is_escaped_everywhere(html):
    assert "A &lt;title&gt;" in html
    assert "PCA &lt;x&gt;" in html
    assert HOSTILE not in html
    payload = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])
    assert HOSTILE in payload["columns"][0]["levels"]


def test_what_is_folded_opens_without_scripts(html):
    assert "<details><summary>Settings</summary><pre><code>a: &lt;1&gt;</code></pre></details>" in html


def test_table_rounds_numbers_and_marks_rows(html):
    assert "0.812" in html
    assert "0.81234" not in html
    assert '<tr class="bold"><td>PCA &lt;x&gt;</td><td class="number">-</td>' in html


def test_scatter_columns_become_codes_or_numbers():
    figure = make_page().sections[0][1][1]
    label, depth, lane = figure.payload["columns"]
    assert label["levels"][label["codes"][0]] == "B"
    assert depth["numbers"][0] is None
    assert set(lane["levels"]) == {"True", "False"}
    assert figure.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(("n_panels", "wide", "high"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2)])
def test_the_still_image_has_two_panels_in_a_row(n_panels, wide, high):
    points = pd.DataFrame({"label": ["B", "T"]})
    figure = scatter_figure({f"map {n}": np.eye(2) for n in range(n_panels)}, points, caption="")
    width, height = (int.from_bytes(figure.png[at : at + 4], "big") for at in (16, 20))
    assert (round(width / (5.2 * 110)), round((height - 0.8 * 110) / (4.8 * 110))) == (wide, high)


def size_of(png: bytes) -> tuple[int, int]:
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    return width, height


@pytest.mark.parametrize("colour_by", [["type"], ["donor", "type"]])
def test_a_long_legend_leaves_the_still_maps_as_large_as_they_were(colour_by):
    types = [f"CD{n}+ effector memory alpha-beta T cell, subset number {n}" for n in range(50)]
    cells = pd.DataFrame({"donor": ["d"] * 50, "type": types})
    maps = {name: np.random.default_rng(0).normal(size=(50, 2)) for name in ("ours", "PCA")}
    few = scatter_figure(maps, cells.assign(type="T"), colour_by=colour_by, caption="")
    many = scatter_figure(maps, cells, colour_by=colour_by, caption="")  # matplotlib warns where maps have no room left
    lines = 50 if len(colour_by) > 1 else 50 / 3
    assert size_of(many.png)[1] - size_of(few.png)[1] == pytest.approx(110 * 0.2 * (lines - 4), abs=30)


def make_pairs():
    rng = np.random.default_rng(0)
    columns = pd.DataFrame({"batch": ["a", "b"] * 10, "type": ["T", "T", "B", "B"] * 5, "depth": rng.random(20)})
    maps = {name: rng.normal(size=(20, 2)) for name in ("ours", "PCA", "Harmony")}
    return scatter_figure(maps, columns, colour_by=["batch", "type"], caption="Pairs.")


def make_dots():
    values = pd.DataFrame({"ours": [0.5, 0.7], "PCA": [0.4, float("nan")]}, index=["B", "T"])
    ends = {"F1": (values - 0.1, values + 0.1)}
    return dot_figure({"F1": values, "silhouette": -values}, intervals=ends, marked=0.0, x="value", caption="Dots.")


def test_every_map_is_drawn_once_for_each_of_the_columns_that_colour_it():
    figure = make_pairs()
    assert [figure.payload["columns"][n]["name"] for n in figure.payload["colour_by"]] == ["batch", "type"]
    assert figure.alt.startswith("3 scatter plots (ours, PCA, Harmony) of 20 cells, coloured by batch and by type")
    width, height = size_of(figure.png)
    assert (round(width / (3.6 * 110)), round((height - 0.8 * 110) / (3.2 * 110))) == (2, 3)


def test_dots_hold_values_and_intervals_in_the_order_of_the_table():
    payload = make_dots().payload
    assert (payload["rows"], payload["marked"]) == (["B", "T"], 0.0)
    first, second = payload["measures"]
    assert [series["name"] for series in first["series"]] == ["ours", "PCA"]
    assert first["series"][0] == {"name": "ours", "x": [0.5, 0.7], "low": [0.4, 0.6], "high": [0.6, 0.8]}
    assert first["series"][1]["x"] == [0.4, None]
    assert "low" not in second["series"][0]


def make_heat():
    table = pd.DataFrame({"B": [3, 0], "T": [1, 0], "none": [0, 0]}, index=["B", "T"])
    return heat_figure({"ours": table, "PCA": table + 1}, x="called", y="type", caption="Heat.")


def test_heat_holds_counts_and_the_shares_of_each_row():
    figure = make_heat()
    assert (figure.payload["rows"], figure.payload["columns"]) == (["B", "T"], ["B", "T", "none"])
    ours = figure.payload["panels"][0]
    assert ours == {"title": "ours", "shares": [[75, 25, 0], [0, 0, 0]], "counts": [[3, 1, 0], [0, 0, 0]]}
    assert figure.png.startswith(b"\x89PNG")
    assert figure.alt == "Tables in colours (ours, PCA): shares of called (B, T, none) for each type (B, T)."


def test_columns_that_are_alike_share_colours_and_shapes():
    columns = pd.DataFrame({"type": ["T", "T", "B"], "called": ["B", "B", "new"]})
    figure = scatter_figure({"map": np.eye(3)[:, :2]}, columns, alike={"called": "type"}, caption="")
    kind, called = figure.payload["columns"]
    assert kind["levels"] == ["T", "B"]
    assert called == {"name": "called", "levels": ["T", "B", "new"], "codes": [1, 1, 2]}


def test_a_line_looks_the_same_in_every_panel():
    lines = {"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}
    payload = line_panels({"both": lines, "b alone": {"b": lines["b"]}}, x="step", y="loss", caption="").payload
    looks = {panel["title"]: {series["name"]: series["look"] for series in panel["series"]} for panel in payload["panels"]}
    assert looks == {"both": {"a": 0, "b": 1}, "b alone": {"b": 1}}


def test_signed_numbers_are_numbers():
    table = Table(pd.DataFrame({"difference": ["+0.02", "-0.010"], "interval": ["-0.1 to +0.2", "+0.1 to +0.2"], "method": ["-x", "PCA"]}))
    assert table.numeric == [True, True, False]


def test_a_missing_package_is_said_before_there_is_a_page(monkeypatch):
    require_packages()
    monkeypatch.setattr("annformer.report.page.find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(ValueError, match=r"plotly.*\n.*\n.*annformer\[report\]"):
        require_packages()


def test_56_categories_all_look_different():
    payload = make_page().sections[0][1][1].payload
    looks = {(payload["colours"][i % len(payload["colours"])], payload["symbols"][i % len(payload["symbols"])]) for i in range(56)}
    assert len(looks) == 56


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("before")
    page = make_page()
    monkeypatch.setattr(Page, "html", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        page.write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text() == "before"


@needs_browser
def test_script_draws_both_maps_and_the_curve_in_a_browser(tmp_path):
    page = make_page().write(tmp_path / "report.html")
    drawn = chromium(page, tmp_path / "profile", "--dump-dom")
    assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == 3
    assert drawn.count('aria-pressed="true"') == 3
    assert "<title>A &lt;title&gt;</title>" in drawn
    assert 'class="scatterlayer' in drawn


@needs_browser
def test_pairs_dots_panels_and_heat_are_drawn_and_fit_a_phone(tmp_path):
    lines = {"a": ([0, 1], [1, 2])}
    page = Page("Pairs").add("Maps", make_pairs()).add("Dots", make_dots())
    page.add("Lines", line_panels({"one": lines, "two": lines}, x="step", y="loss", caption="Lines.")).add("Heat", make_heat())
    path = page.write(tmp_path / "report.html")
    drawn = chromium(path, tmp_path / "profile", "--dump-dom")
    assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == 6 + 1 + 2 + 2
    assert drawn.count("<select>") == 3
    assert drawn.count('aria-pressed="true"') == 2 + 2 + 2
    width, plots = measured_on_phone(path, tmp_path / "profile")
    assert plots == 11
    assert width <= 390, "the page is wider than a phone"


_NAMES_TICKED = """
inside.querySelectorAll("input").forEach(box => { box.checked = true; box.onchange(); });
said = JSON.stringify([...inside.querySelectorAll(".js-plotly-plot")].map(plot => ({
  x: plot._fullLayout.xaxis.range, panel: plot.getBoundingClientRect(),
  names: [...plot.querySelectorAll("g.annotation")].map(one => ({ text: one.textContent, box: one.getBoundingClientRect() })),
})))
"""


@needs_browser
def test_many_long_names_leave_the_map_to_be_seen(tmp_path):
    """The map is as wide as without them, no name lies over another, and they cover no more than a part of it."""
    rng = np.random.default_rng(0)
    types = [f"CD{n % 50}+ effector memory alpha-beta T cell, subset number {n % 50}" for n in range(400)]
    cells = pd.DataFrame({"donor": [f"donor {n % 3}" for n in range(400)], "type": types})
    places = rng.normal(size=(50, 2))[np.arange(400) % 50] * 10 + rng.normal(size=(400, 2))
    figure = scatter_figure({"ours": places}, cells, colour_by=["donor", "type"], caption="Many.")
    path = Page("Many").add("Maps", figure).write(tmp_path / "report.html")
    donors, named = json.loads(told_on_phone(path, tmp_path / "profile", _NAMES_TICKED))
    low, high = places[:, 0].min(), places[:, 0].max()
    assert named["x"] == pytest.approx([low - 0.05 * (high - low), high + 0.05 * (high - low)], rel=1e-3)
    assert 3 <= len(named["names"]) < 50
    assert donors["names"][0]["text"] == "donor 0"
    panel, boxes = named["panel"], [one["box"] for one in named["names"]]
    assert all(len(one["text"]) <= 14 and "…" in one["text"] for one in named["names"])
    assert sum(box["width"] * box["height"] for box in boxes) < 0.35 * panel["width"] * panel["height"]
    assert all(panel["left"] - 2 <= box["left"] and box["right"] <= panel["right"] + 2 for box in boxes)
    for n, one in enumerate(boxes):
        for other in boxes[:n]:
            apart = one["right"] < other["left"] + 2 or other["right"] < one["left"] + 2
            assert apart or one["bottom"] < other["top"] + 4 or other["bottom"] < one["top"] + 4
