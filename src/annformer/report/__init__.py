"""Tables and arrays in, figures and one self-contained HTML page out; knows nothing of the rest of annformer."""

from annformer.report.figures import Figure, dot_figure, heat_figure, line_figure, line_panels, scatter_figure
from annformer.report.maps import umap
from annformer.report.page import Block, Bullets, Code, Facts, Folded, Note, Page, Table, Text, require_packages

__all__ = [
    "Block",
    "Bullets",
    "Code",
    "Facts",
    "Figure",
    "Folded",
    "Note",
    "Page",
    "Table",
    "Text",
    "dot_figure",
    "heat_figure",
    "line_figure",
    "line_panels",
    "require_packages",
    "scatter_figure",
    "umap",
]
