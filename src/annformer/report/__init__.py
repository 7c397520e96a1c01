"""Tables and arrays in, figures and one self-contained HTML page out; knows nothing of the rest of annformer."""

from annformer.report.figures import Figure, line_figure, scatter_figure
from annformer.report.page import Bullets, Code, Facts, Note, Page, Table, Text

__all__ = ["Bullets", "Code", "Facts", "Figure", "Note", "Page", "Table", "Text", "line_figure", "scatter_figure"]
