"""The still images of figures, for readers without scripts: drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from annformer.errors import input_error

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette, which people with any kind of colour vision can tell apart."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star")
"""Marker shapes by plotly's names; seven and eight have no common divisor, so 56 categories look different."""
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "triangle-down": "v", "star": "*"}
_DASHES = ("-", "--", ":", "-.")
MOST_NUMBERED = 15
"""Rows or columns up to which percentages are written into a table of colours."""
_MANY = 4
"""Maps in one picture from which on they are drawn smaller."""
_LONGEST = 33
"""Letters of a label in the legend of maps."""
_LINES_AT_HAND, _LEGEND_LINE = 4, 0.2
"""Lines of a legend for which there is room anyway, and inches of each further one."""

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> x values, y values."""


def scatter_png(panels: Mapping[str, Float[np.ndarray, "cell 2"]], described: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw every panel once for each of the columns in `described`."""
    views = [(title, xy, name) for title, xy in panels.items() for name in described]
    columns = min(2, len(views))
    rows = math.ceil(len(views) / columns)
    small = len(views) > _MANY
    width = (3.6 if small else 5.2) * columns
    labelled = {name: _labels(column) for name, column in described.items()}
    wide = 1 if len(described) > 1 else _side_by_side(next(iter(labelled.values())), width)
    lines = max(math.ceil(len(labels) / wide) for labels in labelled.values())
    height = 0.8 + (3.2 if small else 4.8) * rows + _LEGEND_LINE * max(0, lines - _LINES_AT_HAND)
    figure, axes = _canvas(rows, columns, width=width, height=height)
    for axis in axes[len(views) :]:
        axis.remove()
    for axis, (title, xy, name) in zip(axes, views, strict=False):
        column = described[name]
        if "levels" in column:
            _draw_categories(axis, xy, column, labelled[name], size=8 if small else 20)
        else:
            numbers = np.array([math.nan if value is None else value for value in column["numbers"]])
            figure.colorbar(axis.scatter(xy[:, 0], xy[:, 1], c=numbers, s=14, cmap="cividis"), ax=axis, label=name)
        axis.set(title=f"{title}, by {name}" if len(described) > 1 else title, xticks=[], yticks=[])
        if small:
            axis.title.set_fontsize(9)
    _add_legends(figure, axes, list(described), wide)
    return _png(figure)


def _labels(described: Mapping[str, Any]) -> list[str]:
    """What stands in the legend, with the number of points; of long names the beginning and the end."""
    cut = (_LONGEST - 1) // 2
    short = [name if len(name) <= _LONGEST else f"{name[:cut]}…{name[-cut:]}" for name in described.get("levels", ())]
    return [f"{name} ({described['codes'].count(n)})" for n, name in enumerate(short)]


def _side_by_side(labels: Sequence[str], width: float) -> int:
    """How many of these labels fit beside each other into so many inches."""
    longest = max(map(len, labels), default=0)
    return max(1, min(3, len(labels), int(width / (0.5 + 0.07 * longest))))


def _draw_categories(axis: Any, xy: np.ndarray, described: Mapping[str, Any], labels: Sequence[str], *, size: float) -> None:
    codes = np.array(described["codes"])
    for n, label in enumerate(labels):
        here = xy[codes == n]
        look = {"c": COLOURS[n % len(COLOURS)], "marker": _MARKERS[SYMBOLS[n % len(SYMBOLS)]]}
        axis.scatter(here[:, 0], here[:, 1], **look, s=size, linewidths=0.3, edgecolors="#333333", label=label)


def _add_legends(figure: Any, axes: Sequence[Any], names: Sequence[str], wide: int) -> None:
    """One legend for each column, side by side below the maps; `wide` labels stand beside each other."""
    places = ["outside lower center"] if len(names) == 1 else ["outside lower left", "outside lower right"]
    for axis, name, place in zip(axes, names, places, strict=False):
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc=place, ncols=wide, frameon=False, title=name, markerscale=1.6, fontsize="small")


def lines_png(panels: Mapping[str, Lines], names: Sequence[str], x: str, y: str) -> bytes:
    """Draw plots of lines; the place of a name in `names` is its look."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _canvas(rows, columns, width=7.5 if columns == 1 else 9.0, height=4.0 if rows == 1 else 2.8 * rows)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, (xs, ys) in lines.items():
            n = names.index(name)
            axis.plot(xs, ys, _DASHES[n % len(_DASHES)], color=COLOURS[n % (len(COLOURS) - 1)], linewidth=1.8, label=name)
        axis.set(xlabel=x, ylabel=y, title=title)
        axis.spines[["top", "right"]].set_visible(False)
    if len(panels) == 1:
        axes[0].legend(frameon=False, fontsize="small")
    else:
        labelled = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return _png(figure)


def dots_png(
    measures: Mapping[str, pd.DataFrame], intervals: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], marked: float | None, x: str
) -> bytes:
    """Draw every measure in a plot of its own, one below the other."""
    first = next(iter(measures.values()))
    height = (1.3 + 0.32 * len(first)) * len(measures) + 0.25 * len(first.columns)
    figure, axes = _canvas(len(measures), 1, width=8.0, height=height)
    for axis, (name, table) in zip(axes, measures.items(), strict=True):
        places = np.arange(len(table))[::-1]
        for n, column in enumerate(table.columns):
            look = {"color": COLOURS[n % len(COLOURS)], "marker": _MARKERS[SYMBOLS[n % len(SYMBOLS)]]}
            shift = 0.0 if len(table.columns) == 1 else 0.5 * (0.5 - n / (len(table.columns) - 1))
            axis.plot(table[column], places + shift, linestyle="", label=str(column), markeredgecolor="#333333", **look)
            if name in intervals:
                low, high = intervals[name]
                axis.hlines(places + shift, low[column], high[column], color=COLOURS[n % len(COLOURS)])
        if marked is not None:
            axis.axvline(marked, color="#566074", linewidth=1)
        axis.set(title=name, yticks=places, yticklabels=[str(row) for row in table.index])
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(x)
    if len(first.columns) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _png(figure)


def heat_png(shares: Mapping[str, pd.DataFrame], x: str, y: str) -> bytes:
    """Draw tables of percentages in colours, side by side; numbers stand in them where there is room."""
    first = next(iter(shares.values()))
    labels = 0.08 * max(len(str(name)) for name in (*first.index, *first.columns))
    side = max(2.2, 0.34 * max(first.shape))
    figure, axes = _canvas(1, len(shares), width=(side + labels + 0.4) * len(shares) + 0.8, height=side + labels + 0.9)
    for axis, (title, table) in zip(axes, shares.items(), strict=True):
        image = axis.imshow(table.to_numpy(), cmap="Blues", vmin=0, vmax=100)
        axis.set(title=title, xlabel=x, xticks=range(table.shape[1]), yticks=range(len(table)), yticklabels=list(map(str, table.index)))
        axis.set_xticklabels(list(map(str, table.columns)), rotation=90)
        axis.tick_params(labelsize=8)
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            if value >= 1 and max(table.shape) <= MOST_NUMBERED:
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 55 else "black")
    axes[0].set_ylabel(y)
    figure.colorbar(image, ax=axes, label="% of the row", shrink=0.7)
    return _png(figure)


def _canvas(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    if find_spec("matplotlib") is None:
        found = "figures need matplotlib, which is not installed"
        raise input_error(found, "the extra `report`", "pip install 'annformer[report]'")
    from matplotlib.figure import Figure as Canvas  # not pyplot: no back end is chosen and nothing stays open

    figure = Canvas(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
