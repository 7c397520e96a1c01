from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from annformer.comparison.verdicts import PARTS, VERDICTS, held_against, sentence, unit_of, units_drawn, usable, verdict_table


def judged(ours: float, *others: float, noise: float = 0.01) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    values = {"ours": ours} | {f"floor {n}": value for n, value in enumerate(others)}
    drawn = {name: value + noise * rng.normal(size=(400, 3)) for name, value in values.items()}
    kinds = ["ours"] + ["floor"] * len(others)
    means = pd.DataFrame({"method": list(values), "kind": kinds, "seconds": [240.0] + [2.0] * len(others)})
    for score in VERDICTS:
        means[score] = list(values.values())
    return verdict_table(means, drawn, "ours"), means


@pytest.mark.parametrize(
    ("ours", "word", "advice"),
    [
        (0.8, "beats", ": use ours."),
        (0.5, "loses", ": use floor 1."),
        (0.701, "ties", "whichever is handier (ours took 4 min, floor 1 2 s)."),
    ],
)
def test_the_best_floor_decides(ours, word, advice):
    verdicts, means = judged(ours, 0.6, 0.7, 0.65)
    best = verdicts[verdicts["best_floor"]]
    assert best["other"].to_list() == ["floor 1"] * 3
    assert best["verdict"].to_list() == [word] * 3
    assert best["difference"].to_numpy() == pytest.approx(ours - 0.7)
    assert (best["low"] < best["difference"]).all()
    assert (best["high"] > best["difference"]).all()
    said = sentence(verdicts, means)
    assert said.endswith(advice)
    assert said.count(". ") == 0, "one sentence"


def test_each_score_has_its_own_best_floor():
    _, means = judged(0.6, 0.5, 0.7)
    means.loc[1, "avg_batch"] = 0.9
    drawn = {name: np.tile(rows, (50, 1)) for name, rows in zip(means["method"], means[list(VERDICTS)].to_numpy()[:, None], strict=True)}
    best = verdict_table(means, drawn, "ours").query("best_floor").set_index("score")
    assert best["other"].to_dict() == {"overall": "floor 1", "avg_bio": "floor 1", "avg_batch": "floor 0"}


def test_a_part_that_goes_the_other_way_is_said():
    _, means = judged(0.8, 0.6, 0.5)
    means.loc[2, "avg_bio"] = 0.9
    rng = np.random.default_rng(0)
    drawn = {row["method"]: row[list(VERDICTS)].to_numpy(float) + 0.01 * rng.normal(size=(50, 3)) for _, row in means.iterrows()}
    said = sentence(verdict_table(means, drawn, "ours"), means)
    assert "beats the best baseline, floor 0, in the overall score (" in said
    assert "against the best in each: behind floor 1 in keeping types apart, ahead of floor 0 in mixing batches)" in said
    assert said.endswith("use ours, unless keeping types apart is what matters to you.")


@pytest.mark.parametrize(
    ("nmi", "asw", "said"),
    [
        (0.4, 0.9, "but the parts of keeping types apart disagree: against floor 1 ahead in silhouettes, behind in clusters (NMI)."),
        (0.699, 0.9, None),
        (0.8, 0.9, None),
    ],
)
def test_parts_that_disagree_beyond_chance_are_said(nmi, asw, said):
    verdicts, means = judged(0.8, 0.6, 0.7)
    means = means.assign(nmi=[nmi, 0.9, 0.7], ari=0.7, asw_label=[asw, 0.6, 0.7])
    rng = np.random.default_rng(0)
    drawn = {row["method"]: row[list(PARTS)].to_numpy(float) + 0.01 * rng.normal(size=(400, 3)) for _, row in means.iterrows()}
    text = sentence(verdicts, means, parts=verdict_table(means, drawn, "ours", None, tuple(PARTS)))
    assert text.endswith(f": use ours; {said}" if said else ": use ours.")
    assert text.count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("ours", "said"), [(0.5, "worse than floor 1, simple, which is to be preferred here (-0.200"), (0.9, "better than floor 1, simple (")]
)
def test_what_was_run_is_held_against(ours, said):
    verdicts, _ = judged(ours, 0.6, 0.7)
    sentences = held_against(verdicts, {"floor 1": "simple", "not run": "absent"})
    assert len(sentences) == 1
    assert f"ours is {said}" in sentences[0]


def test_draws_on_which_a_score_is_not_defined_are_left_out():
    _, means = judged(0.8, 0.6)
    drawn = {name: np.full((10, 3), value) for name, value in (("ours", 0.8), ("floor 0", 0.6))}
    drawn["floor 0"][3] = np.nan
    assert verdict_table(means, drawn, "ours")["verdict"].to_list() == ["beats"] * 3
    assert np.flatnonzero(~usable(drawn)).tolist() == [3]


def test_few_batches_make_wider_intervals():
    _, means = judged(0.8, 0.6)
    rng = np.random.default_rng(0)
    drawn = {name: value + 0.01 * rng.normal(size=(400, 3)) for name, value in (("ours", 0.8), ("floor 0", 0.6))}
    width = {n: (rows["high"] - rows["low"]).to_numpy() for n in (None, 5) for rows in [verdict_table(means, drawn, "ours", n)]}
    assert width[5] == pytest.approx(1.584 * width[None], rel=1e-3)


@pytest.mark.parametrize(
    ("n_batches", "n_typed", "drawn", "said"),
    [
        (4, 4, None, "cells within their type (with 4 batches, too few to draw batches)"),
        (5, 5, 5, "whole batches (5 of them)"),
        (6, 2, None, "cells within their type (with 2 batches that have types, too few to draw batches)"),
        (7, 5, 5, "whole batches (5 of 7 have types)"),
    ],
)
def test_batches_are_drawn_where_five_have_types(n_batches, n_typed, drawn, said):
    batches = np.array([f"b{n % n_batches}" for n in range(42)], dtype=object)
    labels = np.where(np.arange(42) % n_batches < n_typed, "T cell", "unknown")
    assert units_drawn(batches, labels) == drawn
    assert unit_of(batches, labels) == said


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.9, "behind floor 0 in accuracy, the best in that): use ours, unless accuracy is what"), (0.1, "use ours.")]
)
def test_scores_of_other_tasks_have_their_words(accuracy, said):
    means = pd.DataFrame(
        {"method": ["ours", "floor 0"], "kind": ["ours", "floor"], "seconds": [9.0, 1.0], "f": [0.8, 0.6], "acc": [0.5, accuracy]}
    )
    rng = np.random.default_rng(0)
    drawn = {row["method"]: row[["f", "acc"]].to_numpy(float) + 0.01 * rng.normal(size=(50, 2)) for _, row in means.iterrows()}
    verdicts = verdict_table(means, drawn, "ours", None, ("f", "acc"))
    assert verdicts["score"].to_list() == ["f", "acc"]
    text = sentence(verdicts, means, {"f": "macro-F1", "acc": "accuracy"})
    assert "ours beats the best baseline, floor 0, in macro-F1 (" in text
    assert said in text
    assert held_against(verdicts, {"floor 0": "simple"}, "acc")[0].startswith("ours is worse" if accuracy > 0.5 else "ours is better")
