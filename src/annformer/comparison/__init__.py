"""Ours beside the simple methods on the same cells: scores, verdicts with intervals, one page. One mechanism, a row per task."""

from __future__ import annotations

from typing import Final

TASKS: Final = {"integrate": "annformer.comparison.integrate"}
"""Task -> the module whose `compare` returns a `Comparison`."""
