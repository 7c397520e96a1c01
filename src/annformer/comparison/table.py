"""A comparison as tables: for the terminal, for the page, for files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from annformer.comparison.result import Comparison

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = {"beats": "green", "loses": "red", "ties": "yellow"}


def csv_tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """File name -> table with every number at full length."""
    tables = {"scores.csv": comparison.scores, "verdicts.csv": comparison.verdicts, "per_type.csv": comparison.per_label}
    return tables | dict(comparison.more_tables)


def obsm_key(method: str, ours: str) -> str:
    """Place of a method's embedding in `obsm`: `X_annformer` for the one that the verdicts are about."""
    return "X_annformer" if method == ours else "X_" + "_".join("".join(c if c.isalnum() else " " for c in method.lower()).split())


def scores_table(comparison: Comparison) -> pd.DataFrame:
    """Methods in rows, best first: the scores that get verdicts, seconds, memory."""
    means = comparison.means()
    spread = comparison.scores.groupby("method")[list(comparison.judged)].std(ddof=1)
    table = means[["method", "kind", "seeds"]].copy()
    for score in comparison.judged:
        table[score.replace("_", " ")] = [
            f"{mean:.3f}" if pd.isna(sd) else f"{mean:.3f} ± {sd:.3f}"
            for mean, sd in zip(means[score], spread[score][means["method"]], strict=True)
        ]
    run = (means["kind"] != "control") & means["seconds"].notna()
    table["seconds"] = [f"{value:.1f}" if ok else "-" for value, ok in zip(means["seconds"], run, strict=True)]
    table["memory, MB"] = [f"{value:,.0f}" if ok else "-" for value, ok in zip(means["memory_mb"], run, strict=True)]
    return table


def verdicts_table(comparison: Comparison) -> pd.DataFrame:
    """One row per verdict, in words and rounded numbers."""
    rows = comparison.verdicts
    return pd.DataFrame(
        {
            "score": rows["score"].str.replace("_", " "),
            "verdict": rows["verdict"],
            "against": rows["other"],
            "ours": rows["value"].map("{:.3f}".format),
            "theirs": rows["other_value"].map("{:.3f}".format),
            "difference": rows["difference"].map("{:+.3f}".format),
            "95 % interval": [f"{low:+.3f} to {high:+.3f}" for low, high in zip(rows["low"], rows["high"], strict=True)],
        }
    )


def on_terminal(comparison: Comparison) -> Iterable[RenderableType]:
    """Scores, the verdicts against the best baselines, and the sentence."""
    from rich.table import Table
    from rich.text import Text

    scores = Table(title=f"Scores, best {comparison.judged[0].replace('_', ' ')} first", title_justify="left")
    table = scores_table(comparison)
    for column in table:
        scores.add_column(str(column), justify="left" if column in ("method", "kind") else "right", no_wrap=True)
    for row in table.itertuples(index=False):
        scores.add_row(*map(str, row), style="bold" if row[0] == comparison.ours else None)
    yield scores
    judged = Table(title=f"{comparison.ours} against the best baseline of each score", title_justify="left")
    rows = verdicts_table(comparison)[comparison.verdicts["best_floor"].to_numpy()]
    for column in rows:
        judged.add_column(str(column), no_wrap=True)
    for row in rows.itertuples(index=False):
        judged.add_row(row[0], Text(row[1], style=COLOURS[row[1]]), *row[2:])
    yield judged
    for name, why in comparison.facts.skipped.items():
        yield Text(f"not run: {name} ({why})")
    for said in (comparison.sentence, *comparison.notes):
        yield Text(said)
