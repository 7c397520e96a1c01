"""`Page`: sections of values become one HTML file that needs nothing else, neither the network nor scripts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from annformer.errors import input_error
from annformer.report.figures import Figure


@dataclass(frozen=True)
class Text:
    """One paragraph of plain text; it is escaped."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be overlooked: a verdict, a caveat."""

    text: str
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Bullets:
    """A list of short paragraphs."""

    items: Sequence[str]
    kind: str = field(default="bullets", init=False)


@dataclass(frozen=True)
class Facts:
    """Names and what they are, as of a data card."""

    facts: Mapping[str, object]
    kind: str = field(default="facts", init=False)


@dataclass(frozen=True)
class Code:
    """Something to be copied letter for letter."""

    text: str
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Folded:
    """Something long to be copied letter for letter, that opens when its title is clicked."""

    title: str
    text: str
    kind: str = field(default="folded", init=False)


@dataclass(frozen=True)
class Table:
    """A table as it is to be read: numbers already rounded or rounded by `digits`; `bold` marks rows by position."""

    frame: pd.DataFrame
    caption: str = ""
    digits: int = 3
    bold: Sequence[int] = ()
    kind: str = field(default="table", init=False)

    @property
    def header(self) -> list[str]:
        """Column names."""
        return [str(column) for column in self.frame.columns]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, to be aligned right."""
        return [
            pd.api.types.is_numeric_dtype(dtype) or all(_is_number(value) for value in self.frame[name])
            for name, dtype in self.frame.dtypes.items()
        ]

    @property
    def rows(self) -> list[list[str]]:
        """Cells as text."""
        return [[self._text(value) for value in row] for row in self.frame.itertuples(index=False)]

    def _text(self, value: Any) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.{self.digits}f}"
        return str(value)


def _is_number(value: object) -> bool:
    """Also "0.81 ± 0.02", "+0.02" and a dash."""
    return str(value).lstrip("+-")[:1].isdigit() or str(value) in {"-", ""}


Block = Text | Note | Bullets | Facts | Code | Folded | Table | Figure


class Page:
    """A report: sections in the order they are added.

    Parameters
    ----------
    title
        The heading and the name of the browser's tab.
    summary
        What one should know who reads nothing else.
    """

    def __init__(self, title: str, summary: str = "") -> None:
        self.title = title
        self.summary = summary
        self.sections: list[tuple[str, list[Block]]] = []

    def add(self, heading: str, *blocks: Block) -> Page:
        """Append a section; return the page, so that calls can be chained."""
        self.sections.append((heading, list(blocks)))
        return self

    def html(self) -> str:
        """Render everything; plotly's script is inlined once, and only when a figure needs it."""
        figures = [block for _, blocks in self.sections for block in blocks if isinstance(block, Figure)]
        return _template().render(page=self, plotly=_plotly() if figures else "", json=_json_for_html)

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_text(self.html(), encoding="utf-8")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        return target


def _json_for_html(value: object) -> str:
    """JSON that may stand inside a script element: no tag can begin in it, no NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _template() -> Any:
    _require("jinja2")
    import jinja2

    loader = jinja2.PackageLoader("annformer.report", package_path=".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja")


@cache
def _plotly() -> str:
    _require("plotly")
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def require_packages() -> None:
    """Say before hours of work that its page could not be made.

    Raises
    ------
    InputError
        When a package of the extra `report` is missing.
    """
    for package in ("jinja2", "plotly", "matplotlib"):
        _require(package)


def _require(package: str) -> None:
    if find_spec(package) is None:
        found = f"the page needs {package}, which is not installed"
        raise input_error(found, "the extra `report`", "pip install 'annformer[report]'")
