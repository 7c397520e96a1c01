"""Cell types from a few labelled cells: the fine-tuned model, the network from scratch, logistic regression (part of pretraining.py)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import annformer as af
from pretraining_cells import interval, means_over, read_cells, resampled_mean, verdict
from pretraining_fewshot_methods import (
    CELLS_PER_STEP,
    DROPOUT,
    FROZEN,
    FROZEN_RANDOM,
    HEAD_RATE,
    LOGISTIC,
    LOGISTIC_VARIABLE,
    MAX_LENGTH,
    MAX_LENGTH_TEST,
    N_VARIABLE,
    POOL,
    PRETRAINED,
    SCRATCH,
    STRENGTHS,
    TEST,
    TUNING,
    WARM_UP,
    WEIGHT_DECAY,
    Methods,
    read_task,
)

SETS = ("pbmc3k", "kang_ifnb_pbmc", "lymphnode_11types", "sc_mixology_lung_cell_lines", "breast_cell_lines_31")
CHOICE_SET = "pbmc4k_scvi_labels"
"""Where settings are chosen; it is not among the sets that are judged."""
PAIRS = {
    "fine-tuned: less from scratch": (PRETRAINED, SCRATCH),
    "fine-tuned: less logistic": (PRETRAINED, LOGISTIC),
    "fine-tuned: less logistic, HVG": (PRETRAINED, LOGISTIC_VARIABLE),
    "frozen: less random": (FROZEN, FROZEN_RANDOM),
    "frozen: less logistic": (FROZEN, LOGISTIC),
}
N_DRAWS = 1_000


class Runs:
    """What each run said of the test cells, kept in a CSV, so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path | None, protocol: str) -> None:
        self.path, self.protocol = path, protocol
        self.said: dict[tuple[str, ...], np.ndarray] = {}
        if path is not None and path.is_file():
            with path.open(newline="") as file:
                for *key, codes in csv.reader(file):
                    self.said[tuple(key)] = np.array(codes.split(), dtype=int)  # a line that broke off has another key, or too few codes

    def get(self, *key: object, n: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The `n` codes of a run; `key`: set, labelled cells, method, setting, seed."""
        names = (self.protocol, *map(str, key))
        if len(self.said.get(names, ())) != n:
            self.said[names] = compute()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", newline="") as file:
                    csv.writer(file).writerow([*names, " ".join(map(str, self.said[names]))])
        return self.said[names]


class LabelledSet:
    """A set, and what the methods say of its test cells."""

    def __init__(self, name: str, path: Path, model: af.ScGPT, runs: Runs, *, n_random: int, seed: int) -> None:
        self.name, self.runs, self.seed = name, runs, seed
        self.task = read_task(read_cells(path, None, seed=seed, labelled=True), model, seed=seed)
        self.methods = Methods(model, self.task, n_random=n_random, seed=seed)
        self.truth = self.task.labels[self.task.test]

    def said(self, n: int, method: str, setting: str, of: int) -> np.ndarray:
        """Codes of the test cells, from draw `of` of `n` labelled cells."""
        rows = self.task.labelled(n, self.seed + of)
        return self.runs.get(
            *(self.name, n, method, setting, of), n=len(self.truth), compute=lambda: self.methods.predict(method, setting, rows, of)
        )

    def score(self, said: np.ndarray) -> float:
        return macro_f1(self.truth, said, len(self.task.types))


def macro_f1(truth: np.ndarray, said: np.ndarray, n_types: int) -> float:
    """Mean over the types that occur in `truth`."""
    hits = np.bincount(truth[truth == said], minlength=n_types)
    both = np.bincount(truth, minlength=n_types) + np.bincount(said, minlength=n_types)
    there = np.bincount(truth, minlength=n_types) > 0
    return float(np.mean(2 * hits[there] / both[there]))


def bootstrap(truth: np.ndarray, said: Sequence[np.ndarray], n_types: int, *, seed: int) -> np.ndarray:
    """Draws of the macro-F1, mean over runs; cells are drawn within their types, the same cells for every method."""
    rng = np.random.default_rng(seed)
    of_type = [np.flatnonzero(truth == code) for code in np.unique(truth)]
    drawn = [np.concatenate([rng.choice(cells, len(cells)) for cells in of_type]) for _ in range(N_DRAWS)]
    return np.array([np.mean([macro_f1(truth[rows], each[rows], n_types) for each in said]) for rows in drawn])


def choose(cells: LabelledSet, sizes: Sequence[int], *, n_seeds: int) -> pd.DataFrame:
    """Macro-F1 of every setting of every method: a row each, `chosen` where it is the method's best for that many labelled cells."""
    rows = []
    for n in sizes:
        for method, settings in cells.methods.settings.items():
            for setting in settings:
                scores = [cells.score(cells.said(n, method, setting, of)) for of in range(n_seeds)]
                rows.append({"labelled": n, "method": method, "setting": setting, "macro_f1": float(np.mean(scores))})
    table = pd.DataFrame(rows)
    best = table.groupby(["labelled", "method"], sort=False)["macro_f1"].idxmax()
    return table.assign(chosen=table.index.isin(best))


def score_set(
    cells: LabelledSet, n: int, chosen: Mapping[str, str], *, n_seeds: int
) -> tuple[list[dict[str, object]], dict[str, np.ndarray]]:
    """A row per run, and the bootstrap draws of each method; random networks are one method."""
    said: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, object]] = []
    facts = {"labelled": n, "set": cells.name, "types": len(cells.task.types), "test_cells": len(cells.truth)}
    for name, setting in chosen.items():
        method = name.partition(" #")[0]
        for of in range(n_seeds):
            each = cells.said(n, name, setting, of)
            said.setdefault(method, []).append(each)
            scores = {"macro_f1": cells.score(each), "accuracy": float(np.mean(cells.truth == each))}
            rows.append({**facts, "method": method, "run": name, "setting": setting, "seed": of, **scores})
    return rows, {method: bootstrap(cells.truth, each, len(cells.task.types), seed=cells.seed) for method, each in said.items()}


def tables(
    model: af.ScGPT,
    sets: Mapping[str, Path],
    choice: Path,
    *,
    sizes: Sequence[int],
    n_seeds: int,
    n_choice_seeds: int,
    n_random: int,
    seed: int,
    runs: Path | None,
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables by name, and what to say under them; `choice` is the file of the set that settings are chosen on."""
    assert choice.stem not in sets
    cut = (CELLS_PER_STEP, MAX_LENGTH, MAX_LENGTH_TEST, HEAD_RATE, WARM_UP, DROPOUT, WEIGHT_DECAY, POOL, TEST, N_VARIABLE, seed)
    kept = Runs(runs, " ".join([model.fingerprint[:12], *map(str, cut)]))
    settings = choose(LabelledSet(choice.stem, choice, model, kept, n_random=n_random, seed=seed), sizes, n_seeds=n_choice_seeds)
    rows: list[dict[str, object]] = []
    draws: dict[int, dict[str, dict[str, np.ndarray]]] = {n: {} for n in sizes}
    for name, path in sets.items():
        cells = LabelledSet(name, path, model, kept, n_random=n_random, seed=seed)
        for n in sizes:
            if n <= len(cells.task.pool):
                chosen = settings[settings["chosen"] & (settings["labelled"] == n)].set_index("method")["setting"].to_dict()
                found, draws[n][name] = score_set(cells, n, chosen, n_seeds=n_seeds)
                rows += found
    scores = pd.DataFrame(rows).sort_values("labelled", kind="stable")
    differences = [row for n in sizes if draws[n] for row in _differences(scores[scores["labelled"] == n], draws[n], n, seed=seed)]
    found = {"fewshot_choice": _by_setting(settings), "fewshot": _means(scores), "fewshot_difference": pd.DataFrame(differences)}
    return found | {"fewshot_all": scores, "fewshot_settings": settings}, _sentences(found["fewshot_difference"]) + _notes(
        settings, choice.stem, n_seeds=n_seeds, n_choice_seeds=n_choice_seeds, n_random=n_random
    )


def _by_setting(settings: pd.DataFrame) -> pd.DataFrame:
    """The grid of fine-tuning, a column per setting."""
    tuned = settings[settings["method"].isin((PRETRAINED, SCRATCH))]
    return tuned.pivot_table("macro_f1", ["labelled", "method"], "setting", sort=False).reset_index()


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    """Macro-F1 of each set and method, and the mean over sets for each number of labelled cells."""
    table = scores.pivot_table("macro_f1", ["labelled", "set", "types", "test_cells"], "method", sort=False).reset_index()
    parts = []
    for n, of in table.groupby("labelled"):
        means = [
            {"labelled": n, "set": title, **of[of["set"].isin(names)].drop(columns=["labelled", "set", "types", "test_cells"]).mean()}
            for title, names in means_over(of["set"]).items()
        ]
        parts += [of, pd.DataFrame(means)]
    return pd.concat(parts, ignore_index=True).fillna("")


def _differences(scores: pd.DataFrame, draws: Mapping[str, Mapping[str, np.ndarray]], n: int, *, seed: int) -> list[dict[str, object]]:
    """Pretrained less each other method: a row per set, and one for each mean."""
    mean = scores.pivot_table("macro_f1", "set", "method", sort=False)
    means = means_over(draws)
    rows: list[dict[str, object]] = [{"labelled": n, "set": name} for name in [*draws, *means]]
    for title, (ours, other) in PAIRS.items():
        each = {name: of[ours] - of[other] for name, of in draws.items()}
        difference = mean[ours] - mean[other]
        found = [*difference.loc[list(draws)], *(difference.loc[names].mean() for names in means.values())]
        of_means = [resampled_mean({name: each[name] for name in names}, seed=seed) for names in means.values()]
        for row, value, drawn in zip(rows, found, [*each.values(), *of_means], strict=True):
            low, high = interval(drawn)
            row[title] = f"{value:+.3f} ({low:+.3f} to {high:+.3f}) {verdict(low, high, even=0, less_is_better=False)}"
    return rows


def _sentences(differences: pd.DataFrame) -> list[str]:
    """The verdicts on the mean of sets in words."""
    others = {
        "fine-tuned: less from scratch": "Fine-tuned, the pretrained network {} the same network from scratch",
        "fine-tuned: less logistic": "{} logistic regression on all genes",
        "fine-tuned: less logistic, HVG": "{} logistic regression on variable genes",
        "frozen: less random": "frozen, it {} frozen random networks",
        "frozen: less logistic": "{} logistic regression on all genes",
    }
    verbs = {"beats": "beats", "loses": "loses to", "ties": "ties with"}
    said = []
    for row in differences[differences["set"] == "mean of sets"].to_dict("records"):
        parts = [text.format(verbs[row[title].split()[-1]]) + f" ({row[title].rpartition(' ')[0]})" for title, text in others.items()]
        n_sets = (~differences["set"].str.startswith("mean ") & (differences["labelled"] == row["labelled"])).sum()
        said.append(f"{row['labelled']:,} labelled cells, {n_sets} sets: {', '.join(parts[:3])}; {', '.join(parts[3:])}.")
    return said


def _unfinished(chosen: pd.DataFrame) -> list[str]:
    """What is to be said where the longest training of the grid is the best."""
    tuned = chosen[chosen["method"].isin((PRETRAINED, SCRATCH))]
    n_steps = tuned["setting"].str.extract(r", (\d+) steps")[0].astype(int)
    longest = max(int(setting.replace(",", "").split()[2]) for setting in TUNING)
    of = [f"{row.method} at {row.labelled:,}" for row in tuned[n_steps == longest].itertuples()]
    if not of:
        return []
    return [
        f"The longest training of the grid, {longest} steps, was the best of {', '.join(of)} labelled cells: they have not converged. From"
        " scratch says what the same training gives without pretraining, not what it could reach at any cost; logistic regression and the"
        " frozen random networks are the floors that do not depend on the number of steps."
    ]


def _notes(settings: pd.DataFrame, choice: str, *, n_seeds: int, n_choice_seeds: int, n_random: int) -> list[str]:
    chosen = settings[settings["chosen"]]
    of = {n: ", ".join(f"{row.method} {row.setting}" for row in group.itertuples()) for n, group in chosen.groupby("labelled")}
    return [
        f"Mean of {n_seeds} draws of the labelled cells; test cells (at most {TEST} a set) are never drawn. From scratch: the same network"
        " and training, random weights.",
        f"Networks read the {N_VARIABLE:,} most variable genes of a set. Fine-tuning of all weights: CLS objective, AdamW, steps of"
        f" {CELLS_PER_STEP} cells with at most {MAX_LENGTH} tokens (of test cells {MAX_LENGTH_TEST}), weight decay {WEIGHT_DECAY:g},"
        f" dropout {DROPOUT:g}, warm-up {WARM_UP:.0%}, then linear decay, the new head at {HEAD_RATE} times the rate or at the same"
        f" (*one rate*); each start has the best of the same {len(TUNING)} settings.",
        f"Logistic regression: log-normalised expression of all genes of the set, or of the same variable ones. Frozen:"
        " logistic regression on the cell states of the pretrained network, or of random ones (mean of"
        f" {n_random}), which are not trained further. Each has the best of {len(STRENGTHS)} penalties and scalings.",
        *_unfinished(chosen),
        f"All settings are chosen for each number of labelled cells on {choice}, which is left out of the verdict (macro-F1, draws of"
        f" labelled cells: {n_choice_seeds}): {'; '.join(f'{n}: {text}' for n, text in of.items())}.",
        "Intervals: 95 %, bootstrap over test cells within their types; of the mean, over sets and cells; seeds are averaged.",
    ]
