"""Figures that are two things at once: data for an interactive picture, and a finished PNG for readers without scripts."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from annformer.report.stills import COLOURS, SYMBOLS, Lines, dots_png, heat_png, lines_png, scatter_png

_DIGITS = 4


@dataclass(frozen=True)
class Figure:
    """An interactive picture with its still image."""

    caption: str
    alt: str
    """What the picture shows, for those who do not see it."""
    payload: Mapping[str, Any]
    """What the page's script draws: {"kind": "scatter" | "lines" | "dots" | "heat", ...}."""
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
    colour_by: Sequence[str] | None = None,
    hover: Sequence[str] | None = None,
    alike: Mapping[str, str] | None = None,
    caption: str,
    point: str = "cell",
) -> Figure:
    """Draw the same points in several panels, coloured by any column.

    Parameters
    ----------
    panels
        Title -> coordinates, points in one common order.
    columns
        One row per point. Categories get a colour and a shape, numbers a scale.
    colour_by
        Columns that colour every panel in the still image, and in the picture at first; with several, each panel is drawn once for each
        of them, side by side. By default the first column.
    hover
        Name of each point, shown under the pointer; by default the row names of `columns`.
    alike
        Column -> another whose colours and shapes it shares, category by category.
    caption
        Stands under the picture.
    point
        What a point is.
    """
    shown = [str(columns.columns[0])] if colour_by is None else list(colour_by)
    names = [str(name) for name in (columns.index if hover is None else hover)]
    described = {str(column): _column(columns[column]) for column in columns}
    for name, other in (alike or {}).items():
        described[name] = _column(columns[name], described[other]["levels"])
    payload = {
        "kind": "scatter",
        "colours": COLOURS,
        "symbols": SYMBOLS,
        "hover": names,
        "panels": [{"title": title, "x": _rounded(xy[:, 0]), "y": _rounded(xy[:, 1])} for title, xy in panels.items()],
        "columns": [{"name": name} | column for name, column in described.items()],
        "colour_by": [list(described).index(name) for name in shown],
    }
    alt = f"{len(panels)} scatter plots ({', '.join(panels)}) of {len(columns)} {point}s, coloured by {' and by '.join(shown)}."
    png = scatter_png(panels, {name: described[name] for name in shown})
    return Figure(caption=caption, alt=alt, payload=payload, png=png)


def line_figure(lines: Lines, *, x: str, y: str, caption: str) -> Figure:
    """Draw named lines, each (x values, y values); each has its own colour and dash."""
    return line_panels({"": lines}, x=x, y=y, caption=caption)


def line_panels(panels: Mapping[str, Lines], *, x: str, y: str, caption: str) -> Figure:
    """Draw several plots of lines: title -> lines. A line keeps its look wherever it occurs."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn = [
        {
            "title": title,
            "series": [{"name": name, "look": names.index(name), "x": _rounded(xs), "y": _rounded(ys)} for name, (xs, ys) in lines.items()],
        }
        for title, lines in panels.items()
    ]
    payload = {"kind": "lines", "colours": COLOURS, "x": x, "y": y, "panels": drawn}
    titled = f" ({', '.join(panels)})" if any(panels) else ""
    alt = f"Line plot{'s' if len(panels) > 1 else ''}{titled} of {y} against {x}: {', '.join(names)}."
    return Figure(caption=caption, alt=alt, payload=payload, png=lines_png(panels, names, x, y))


def dot_figure(
    measures: Mapping[str, pd.DataFrame],
    *,
    intervals: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]] | None = None,
    marked: float | None = None,
    x: str,
    caption: str,
) -> Figure:
    """Draw a dot for every row and column of a table: rows below each other, columns in colours and shapes.

    Parameters
    ----------
    measures
        Name -> table; all have the same rows and columns. The picture shows one at a time, the still image all of them.
    intervals
        Name -> lower and upper ends, tables of the same form.
    marked
        A value that is marked by a line, such as 0 for a difference.
    x
        What the values are.
    """
    first = next(iter(measures.values()))
    rows, columns = [str(row) for row in first.index], [str(column) for column in first.columns]

    def series(name: str) -> list[dict[str, Any]]:
        low, high = (intervals or {}).get(name, (None, None))
        ends = {} if low is None or high is None else {"low": low, "high": high}
        return [
            {"name": column, "x": _rounded(measures[name].iloc[:, n]), **{end: _rounded(table.iloc[:, n]) for end, table in ends.items()}}
            for n, column in enumerate(columns)
        ]

    drawn = [{"name": name, "series": series(name)} for name in measures]
    payload = {"kind": "dots", "colours": COLOURS, "symbols": SYMBOLS, "x": x, "marked": marked, "rows": rows, "measures": drawn}
    alt = f"Dots of {x} ({', '.join(measures)}) for {', '.join(rows)}; colours and shapes are {', '.join(columns)}."
    return Figure(caption=caption, alt=alt, payload=payload, png=dots_png(measures, intervals or {}, marked, x))


def heat_figure(tables: Mapping[str, pd.DataFrame], *, x: str, y: str, caption: str) -> Figure:
    """Draw tables of counts side by side, each row coloured by the shares of its columns.

    Parameters
    ----------
    tables
        Title -> counts; all have the same rows and columns.
    x, y
        What columns and rows are.
    """
    first = next(iter(tables.values()))
    rows, columns = [str(row) for row in first.index], [str(column) for column in first.columns]
    shares = {title: 100 * table.div(table.sum(axis=1).clip(lower=1), axis=0) for title, table in tables.items()}
    panels = [
        {"title": title, "shares": [_rounded(row) for row in shares[title].to_numpy()], "counts": table.to_numpy().tolist()}
        for title, table in tables.items()
    ]
    payload = {"kind": "heat", "x": x, "y": y, "rows": rows, "columns": columns, "panels": panels}
    alt = f"Tables in colours ({', '.join(tables)}): shares of {x} ({', '.join(columns)}) for each {y} ({', '.join(rows)})."
    return Figure(caption=caption, alt=alt, payload=payload, png=heat_png(shares, x, y))


def _column(values: pd.Series, first: Sequence[str] = ()) -> dict[str, Any]:
    """Describe a column as categories (codes into levels: those of `first`, then the most frequent) or numbers."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return {"numbers": _rounded(values.to_numpy(dtype=float))}
    text = values.astype(object).where(values.notna(), "(missing)").astype(str)
    levels = list(dict.fromkeys([*first, *text.value_counts(sort=True).index]))
    place = {level: n for n, level in enumerate(levels)}
    return {"levels": levels, "codes": [place[value] for value in text]}


def _rounded(values: Sequence[float] | np.ndarray | pd.Series) -> list[float | None]:
    """Four significant digits are more than a screen shows; what is not a number becomes null."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in np.asarray(values, dtype=float)]
