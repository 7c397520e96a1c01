"""From scores on bootstrap draws to verdicts, and from verdicts to one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped

from annformer.durations import in_words
from annformer.evaluate.integration import UNLABELLED
from annformer.evaluate.verdict import FEWEST_UNITS, verdict

IN_WORDS: Final = {"overall": "the overall score", "avg_bio": "keeping types apart", "avg_batch": "mixing batches"}
"""The scores of integration that get verdicts, the one that decides first -> what it is to be good in them."""
VERDICTS: Final = tuple(IN_WORDS)
"""Their names."""
PARTS: Final = {"nmi": "clusters (NMI)", "ari": "clusters (ARI)", "asw_label": "silhouettes"}
"""What AvgBIO is the mean of -> in words: a sum says nothing where they disagree."""


def units_drawn(batches: Shaped[np.ndarray, "cell"], labels: Shaped[np.ndarray, "cell"]) -> int | None:
    """How many batches the bootstrap draws: those with types, as the scores that get verdicts see no others; None where it draws cells."""
    n = _n_typed(batches, labels)
    return n if n >= FEWEST_UNITS else None


def unit_of(batches: Shaped[np.ndarray, "cell"], labels: Shaped[np.ndarray, "cell"]) -> str:
    """What the bootstrap draws of these cells."""
    n, n_all = _n_typed(batches, labels), len(set(batches))
    if units_drawn(batches, labels) is None:
        return f"cells within their type (with {n} batches{'' if n == n_all else ' that have types'}, too few to draw batches)"
    return f"whole batches ({n} of them)" if n == n_all else f"whole batches ({n} of {n_all} have types)"


def usable(drawn: Mapping[str, Float[np.ndarray, "draw score"]]) -> Bool[np.ndarray, "draw"]:
    """Draws on which every score of every method is defined: it is not where no cell with a type was drawn."""
    return np.all([np.isfinite(scores).all(axis=1) for scores in drawn.values()], axis=0)


def verdict_table(
    means: pd.DataFrame,
    drawn: Mapping[str, Float[np.ndarray, "draw score"]],
    ours: str,
    n_units: int | None = None,
    scores: Sequence[str] = VERDICTS,
) -> pd.DataFrame:
    """Judge `ours` against every other method.

    Parameters
    ----------
    means
        One row per method, averaged over seeds: method, kind, and the scores.
    drawn
        Method -> its scores on the same draws, averaged over seeds; the first columns are `scores`.
    n_units
        Batches that were drawn, None where it were cells.
    scores
        Those that get verdicts.
    """
    defined = usable(drawn)
    by_method = means.set_index("method")
    floors = by_method[by_method["kind"] == "floor"]
    rows = []
    for n, score in enumerate(scores):
        best = floors[score].idxmax()
        others = by_method.drop(index=ours).sort_values(score, ascending=False, kind="stable")
        for other in sorted(others.index, key=lambda name: name != best):
            word, _, low, high = verdict(drawn[ours][defined, n], drawn[other][defined, n], n_units)
            value, other_value = (float(by_method[score][name]) for name in (ours, other))
            row = {"score": score, "ours": ours, "other": other, "kind": by_method.loc[other, "kind"], "best_floor": other == best}
            numbers = {"value": value, "other_value": other_value, "difference": value - other_value, "low": low, "high": high}
            rows.append(row | numbers | {"verdict": word})
    return pd.DataFrame(rows)


def sentence(
    verdicts: pd.DataFrame, means: pd.DataFrame, scores: Mapping[str, str] = IN_WORDS, *, parts: pd.DataFrame | None = None
) -> str:
    """Say in one sentence whether to trust `ours` on these cells.

    Parameters
    ----------
    scores
        Those with verdicts, the one that decides first -> what it is to be good in them.
    parts
        Verdicts on `PARTS`, to say where they contradict each other.
    """
    best = verdicts[verdicts["best_floor"]].set_index("score")
    first, *others = scores
    decides = next(row for score, row in best.iterrows() if score == first)
    words = {score: str(best.loc[score, "verdict"]) for score in scores}
    verb = {"beats": "beats", "ties": "ties with", "loses": "loses to"}[words[first]]
    stands = {"beats": "ahead of", "ties": "level with", "loses": "behind"}
    in_others = ", ".join(f"{stands[words[score]]} {best['other'].astype(str)[score]} in {scores[score]}" for score in others)
    in_each = f"against the best in each: {in_others}" if len(others) > 1 else f"{in_others}, the best in that"
    claim = f"{decides['ours']} {verb} the best baseline, {decides['other']}, in {scores[first]} ({_between(decides)}; {in_each})"
    advice = _advice(str(decides["ours"]), str(decides["other"]), words, means, scores)
    return f"On these cells {claim}: {advice}{'' if parts is None else _contradiction(parts, str(decides['other']))}."


def caveats(n_seeds: int) -> list[str]:
    """What to know before the sentence is believed."""
    if n_seeds >= 3:
        return []
    return [f"Methods with randomness ran with {n_seeds} seed{'s' * (n_seeds > 1)}: three or more say how much is chance (--seeds 3)."]


def held_against(verdicts: pd.DataFrame, others: Mapping[str, str], score: str = "overall") -> list[str]:
    """Say how `ours` does in one score against those of `others` (name -> what it is) that were run, a sentence each."""
    rows = {str(row["other"]): row for _, row in verdicts[verdicts["score"] == score].iterrows()}
    said = {"beats": "better than {}", "ties": "no better and no worse than {}", "loses": "worse than {}, which is to be preferred here"}
    return [
        f"{rows[other]['ours']} is {said[rows[other]['verdict']].format(f'{other}, {what}')} ({_between(rows[other])})."
        for other, what in others.items()
        if other in rows
    ]


def _contradiction(parts: pd.DataFrame, other: str) -> str:
    """Say that of the parts of one score some are better than those of `other` and some worse, both beyond chance; else nothing."""
    said = {str(row["score"]): str(row["verdict"]) for _, row in parts[parts["other"] == other].iterrows()}
    ahead, behind = (" and ".join(PARTS[score] for score, word in said.items() if word == wanted) for wanted in ("beats", "loses"))
    if not (ahead and behind):
        return ""
    return f"; but the parts of {IN_WORDS['avg_bio']} disagree: against {other} ahead in {ahead}, behind in {behind}"


def _n_typed(batches: Shaped[np.ndarray, "cell"], labels: Shaped[np.ndarray, "cell"]) -> int:
    return len(set(batches[~np.isin(labels, UNLABELLED)]))


def _between(row: pd.Series) -> str:
    return f"{row['difference']:+.3f}, 95 % interval {row['low']:+.3f} to {row['high']:+.3f}"


def _advice(ours: str, other: str, words: Mapping[str, str], means: pd.DataFrame, scores: Mapping[str, str]) -> str:
    first, *others = scores
    if words[first] == "ties":
        seconds = means.set_index("method")["seconds"]
        return f"use whichever is handier ({ours} took {in_words(seconds[ours])}, {other} {in_words(seconds[other])})"
    won = words[first] == "beats"
    against = "loses" if won else "beats"
    but = [scores[score] for score in others if words[score] == against]
    return f"use {ours if won else other}" + (f", unless {but[0]} is what matters to you" if but else "")
