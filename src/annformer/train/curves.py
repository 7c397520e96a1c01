"""The curves of a run, as people would rather see them."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

log = logging.getLogger(__name__)


def draw_curves(history: pd.DataFrame, path: Path) -> None:
    """Draw every loss over the steps, training and held-out cells together."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        log.info("no curves are drawn without matplotlib (pip install 'annformer[report]'); their numbers stand in log.csv")
        return
    names = [name.removeprefix("validation/") for name in map(str, history.columns) if name.startswith("validation/")]
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for kind, style in (("train", {"lw": 0.8, "color": "#9aa6b2"}), ("validation", {"marker": "o", "ms": 3, "color": "#b3541e"})):
            if f"{kind}/{name}" in history:
                some = history[["step", f"{kind}/{name}"]].dropna()
                axes.plot(some["step"], some[f"{kind}/{name}"], label={"train": "training", "validation": "held out"}[kind], **style)
        axes.set(title=name.replace("_", " "), xlabel="step")
        if f"validation/{name}" in history:
            late = pd.concat([history[f"{kind}/{name}"][history["step"] > history["step"].max() / 20] for kind in ("train", "validation")])
            axes.set_ylim(late.min() * 0.98, late.quantile(0.99) * 1.02)
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
