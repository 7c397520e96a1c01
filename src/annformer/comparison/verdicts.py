"""From scores on bootstrap draws to verdicts, and from verdicts to one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Float

from annformer.durations import in_words
from annformer.evaluate.verdict import FEWEST_UNITS, verdict

VERDICTS: Final = ("overall", "avg_bio", "avg_batch")
"""The scores that get verdicts."""


def unit_of(batches: Sequence[object] | np.ndarray) -> str:
    """What the bootstrap draws of these cells."""
    n = len(pd.unique(np.asarray(batches, dtype=object)))
    return f"whole batches ({n} of them)" if n >= FEWEST_UNITS else f"cells within their type (with {n} batches, too few to draw batches)"


def verdict_table(means: pd.DataFrame, drawn: Mapping[str, Float[np.ndarray, "draw score"]], ours: str) -> pd.DataFrame:
    """Judge `ours` against every other method.

    Parameters
    ----------
    means
        One row per method, averaged over seeds: method, kind, and the scores.
    drawn
        Method -> its scores on the same draws, averaged over seeds; the columns are `VERDICTS`.
    """
    usable = np.all([np.isfinite(scores).all(axis=1) for scores in drawn.values()], axis=0)
    by_method = means.set_index("method")
    floors = by_method[by_method["kind"] == "floor"]
    rows = []
    for n, score in enumerate(VERDICTS):
        best = floors[score].idxmax()
        others = by_method.drop(index=ours).sort_values(score, ascending=False, kind="stable")
        for other in sorted(others.index, key=lambda name: name != best):
            word, _, low, high = verdict(drawn[ours][usable, n], drawn[other][usable, n])
            value, other_value = (float(by_method[score][name]) for name in (ours, other))
            row = {"score": score, "ours": ours, "other": other, "kind": by_method.loc[other, "kind"], "best_floor": other == best}
            numbers = {"value": value, "other_value": other_value, "difference": value - other_value, "low": low, "high": high}
            rows.append(row | numbers | {"verdict": word})
    return pd.DataFrame(rows)


def sentence(verdicts: pd.DataFrame, means: pd.DataFrame) -> str:
    """Say in one sentence whether to trust `ours` on these cells."""
    best = verdicts[verdicts["best_floor"]].set_index("score")
    overall = next(row for score, row in best.iterrows() if score == "overall")
    words = {score: str(best.loc[score, "verdict"]) for score in VERDICTS}
    verb = {"beats": "beats", "ties": "ties with", "loses": "loses to"}[words["overall"]]
    stands = {"beats": "ahead of", "ties": "level with", "loses": "behind"}
    parts = f"{stands[words['avg_bio']]} the best baseline in keeping types apart, {stands[words['avg_batch']]} it in mixing batches"
    claim = f"{overall['ours']} {verb} the best baseline, {overall['other']}, in the overall score ({_between(overall)}; {parts})"
    return f"On these cells {claim}: {_advice(str(overall['ours']), str(overall['other']), words, means)}."


def held_against(verdicts: pd.DataFrame, others: Mapping[str, str]) -> list[str]:
    """Say how `ours` does in the overall score against those of `others` (name -> what it is) that were run, a sentence each."""
    rows = {str(row["other"]): row for _, row in verdicts[verdicts["score"] == "overall"].iterrows()}
    said = {"beats": "better than {}", "ties": "no better and no worse than {}", "loses": "worse than {}, which is to be preferred here"}
    return [
        f"{rows[other]['ours']} is {said[rows[other]['verdict']].format(f'{other}, {what}')} ({_between(rows[other])})."
        for other, what in others.items()
        if other in rows
    ]


def _between(row: pd.Series) -> str:
    return f"{row['difference']:+.3f}, 95 % interval {row['low']:+.3f} to {row['high']:+.3f}"


def _advice(ours: str, other: str, words: Mapping[str, str], means: pd.DataFrame) -> str:
    if words["overall"] == "ties":
        seconds = means.set_index("method")["seconds"]
        return f"use whichever is handier ({ours} took {in_words(seconds[ours])}, {other} {in_words(seconds[other])})"
    won = words["overall"] == "beats"
    against = "loses" if won else "beats"
    but = [what for score, what in (("avg_bio", "keeping types apart"), ("avg_batch", "mixing batches")) if words[score] == against]
    return f"use {ours if won else other}" + (f", unless {but[0]} is what matters to you" if but else "")
