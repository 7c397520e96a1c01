"""Ours beside the simple methods on the same cells: scores, verdicts with intervals, one page. One mechanism, a row per task."""

from __future__ import annotations

from typing import Final

TASKS: Final = {"integrate": "annformer.comparison.integrate", "annotate": "annformer.comparison.annotate"}
"""Task -> the module whose `compare` returns a `Comparison`."""

PAGES: Final = {"integrate": "annformer.comparison.page", "annotate": "annformer.comparison.annotation_page"}
"""Task -> the module whose `write_page` makes its page."""
