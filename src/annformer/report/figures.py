"""Figures that are two things at once: data for an interactive picture, and a finished PNG for readers without scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
_MATPLOTLIB = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "triangle-down": "v", "star": "*"}
_DIGITS = 4


@dataclass(frozen=True)
class Figure:
    """An interactive picture with its still image."""

    caption: str
    alt: str
    """What the picture shows, for those who do not see it."""
    payload: Mapping[str, Any]
    """What the page's script draws: {"kind": "scatter" | "lines", ...}."""
    png: bytes
    kind: str = field(default="figure", init=False)

    @property
    def data_uri(self) -> str:
        """The still image as an address that loads nothing."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def scatter_figure(
    panels: Mapping[str, Float[np.ndarray, "cell 2"]],
    columns: pd.DataFrame,
    *,
    hover: Sequence[str] | None = None,
    caption: str,
    point: str = "cell",
) -> Figure:
    """Draw the same points in several panels side by side, coloured by any column.

    Parameters
    ----------
    panels
        Title -> coordinates, points in one common order.
    columns
        One row per point; the first column colours the still image, and the picture at first. Categories get a colour and a shape,
        numbers a scale.
    hover
        Name of each point, shown under the pointer; by default the row names of `columns`.
    caption
        Stands under the picture.
    point
        What a point is.
    """
    names = [str(name) for name in (columns.index if hover is None else hover)]
    described = {str(column): _column(columns[column]) for column in columns}
    payload = {
        "kind": "scatter",
        "colours": COLOURS,
        "symbols": SYMBOLS,
        "hover": names,
        "panels": [{"title": title, "x": _rounded(xy[:, 0]), "y": _rounded(xy[:, 1])} for title, xy in panels.items()],
        "columns": [{"name": name} | column for name, column in described.items()],
    }
    first = str(columns.columns[0])
    alt = f"{len(panels)} scatter plots ({', '.join(panels)}) of {len(columns)} {point}s, coloured by {first}."
    return Figure(caption=caption, alt=alt, payload=payload, png=_scatter_png(panels, first, described[first]))


def line_figure(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, caption: str) -> Figure:
    """Draw named lines, each (x values, y values); each has its own colour and dash."""
    series = [{"name": name, "x": _rounded(xs), "y": _rounded(ys)} for name, (xs, ys) in lines.items()]
    payload = {"kind": "lines", "colours": COLOURS, "x": x, "y": y, "series": series}
    alt = f"Line plot of {y} against {x}: {', '.join(lines)}."
    return Figure(caption=caption, alt=alt, payload=payload, png=_lines_png(lines, x, y))


def _column(values: pd.Series) -> dict[str, Any]:
    """Describe a column as categories (codes into levels, most frequent first) or numbers."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return {"numbers": _rounded(values.to_numpy(dtype=float))}
    text = values.astype(object).where(values.notna(), "(missing)").astype(str)
    levels = list(text.value_counts(sort=True).index)
    place = {level: n for n, level in enumerate(levels)}
    return {"levels": levels, "codes": [place[value] for value in text]}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Four significant digits are more than a screen shows; what is not a number becomes null."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in np.asarray(values, dtype=float)]


def _scatter_png(panels: Mapping[str, np.ndarray], column: str, described: Mapping[str, Any]) -> bytes:
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _canvas(rows, columns, width=5.2 * columns, height=0.8 + 4.8 * rows)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, xy) in zip(axes, panels.items(), strict=False):
        if "levels" in described:
            _draw_categories(axis, xy, described)
        else:
            numbers = np.array([math.nan if value is None else value for value in described["numbers"]])
            figure.colorbar(axis.scatter(xy[:, 0], xy[:, 1], c=numbers, s=14, cmap="cividis"), ax=axis, label=column)
        axis.set(title=title, xticks=[], yticks=[])
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, title=column, markerscale=1.6)
    return _png(figure)


def _draw_categories(axis: Any, xy: np.ndarray, described: Mapping[str, Any]) -> None:
    codes = np.array(described["codes"])
    for n, level in enumerate(described["levels"]):
        here = xy[codes == n]
        colour, marker = COLOURS[n % len(COLOURS)], _MATPLOTLIB[SYMBOLS[n % len(SYMBOLS)]]
        axis.scatter(
            here[:, 0], here[:, 1], c=colour, marker=marker, s=20, linewidths=0.3, edgecolors="#333333", label=f"{level} ({len(here)})"
        )


def _lines_png(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> bytes:
    figure, axes = _canvas(1, 1, width=7.5, height=4.0)
    styles = ("-", "--", ":", "-.")
    for n, (name, (xs, ys)) in enumerate(lines.items()):
        axes[0].plot(xs, ys, styles[n % len(styles)], color=COLOURS[n % (len(COLOURS) - 1)], linewidth=1.8, label=name)
    axes[0].set(xlabel=x, ylabel=y)
    axes[0].legend(frameon=False)
    axes[0].spines[["top", "right"]].set_visible(False)
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
