"""Put a finished pretraining run into the package as a model that ships.

    python scripts/ship_model.py RUN --halve HALF
    python scripts/ship_model.py RUN --store STORE --evaluation DIR --choices CHOICES.md

RUN is the folder of `annformer pretrain`. What ships has float16 numbers; the first line writes such a model to the folder HALF, so that it
is what is evaluated. STORE is what it was trained on (with label columns `tissue`, `licence` and `origin`), DIR what
`benchmarks/pretraining.py --model HALF --out DIR > DIR/evaluation.md` wrote, CHOICES.md what was tried before, as Markdown.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd

import annformer as af
from annformer.card import FLOORS, Ratio, model_card
from annformer.data.store import StoreSource

MODELS = Path(__file__).resolve().parent.parent / "src" / "annformer" / "models"
LICENCE = (
    "The weights come under the licence of annformer, BSD-3-Clause. The cells are public measurements; the table above says under which "
    "licence the repositories that they were taken from stand."
)
GOOD_FOR = (
    "trying annformer on a laptop, without a download: embeddings, gene embeddings, a start for fine-tuning",
    "cell types from few labelled cells: a linear head on its embedding is ahead of logistic regression on the genes, see the evaluation",
    "human cells like those of the corpus, most of which are blood and lung tumours; how well it does on others stands in the evaluation",
)
NOT_GOOD_FOR = (
    "atlases: the corpus has 17,000 cells of few tissues; the published models were pretrained on millions",
    "conclusions from its embedding alone where PCA of the same cells says otherwise: see the evaluation",
    "telling apart cells of tissues that the corpus hardly has (cell lines, islets, cortex): PCA of the same cells does that better",
    "species other than human, and genes that are marked untrained (`untrained_genes` in config.json), which it does not read",
)
LIMITS = (
    "zero counts are not read: the network sees expressed genes only",
    "the profile reads the directions in which the cells of the corpus vary: what tells cells of other tissues apart it reads in part",
    "GEPC reads, by the profile, all genes of a cell that are not asked for, the ridge and GEP those that became tokens (at most 1,200)",
    "no correction of batches: cells of different studies differ in the embedding by technique as well",
    "what stands in the evaluation was measured on small public sets, blood above all; those named zheng_* are of the study that "
    "pbmc_frozenA_mudan is from, other cells, but maybe of the same donor",
    "one run with one seed",
)


def main() -> None:
    """Read the run, write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--halve", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--choices", type=Path)
    options = parser.parse_args()
    model = af.ScGPT.from_pretrained(options.run / "model")
    if options.halve is not None:
        model.save_pretrained(options.halve, half=True)
        return
    if None in (options.store, options.evaluation, options.choices):
        parser.error("give --halve, or --store, --evaluation and --choices")
    measured = pd.read_csv(options.evaluation / "expression.csv").set_index("set").loc["mean of sets"]
    unseen = {"gep": measured["GEP"], "gepc": measured["GEPC"], "gene mean": measured["gene mean"], "ridge": measured["ridge"]}
    provenance = model.config.provenance | {"squared_error_on_unseen_sets": {name: float(value) for name, value in unseen.items()}}
    model.config = model.config.with_(provenance=provenance)
    card = model_card(
        model.name,
        provenance | {"held_out_squared_error": unseen},
        sources=sources(StoreSource(options.store)),
        ratios=ratios(measured),
        curve=curve(pd.read_csv(options.run / "log.csv")),
        facts=facts(model),
        evaluation={
            "On cells that it never saw": (options.evaluation / "evaluation.md").read_text(encoding="utf-8"),
            "What was tried before": options.choices.read_text(encoding="utf-8"),
        },
        good_for=GOOD_FOR,
        not_good_for=NOT_GOOD_FOR,
        limits=LIMITS,
        licence=LICENCE,
    )
    folder = MODELS / model.name
    model.save_pretrained(folder, card=card, half=True)
    (folder / "model.safetensors").chmod(0o644)
    evaluated = re.search(r"fingerprint (\w{12})", (options.evaluation / "evaluation.md").read_text(encoding="utf-8"))
    shipped = af.ScGPT.from_pretrained(folder).fingerprint[:12]
    if evaluated is None or evaluated[1] != shipped:
        print(f"WARNING: {shipped} ships, and the evaluation is of {evaluated and evaluated[1]}")
    print(f"{folder}: {(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


def ratios(measured: pd.Series) -> dict[str, Ratio]:
    """GEP's error over each floor's with its interval, as the evaluation writes them: `0.889 (0.867 to 0.914) beats`."""
    return {floor: Ratio(*map(float, re.findall(r"\d+\.\d+", measured[f"GEP / {floor}"]))) for floor in FLOORS}


def sources(store: StoreSource) -> list[dict[str, object]]:
    """One row for each study of the corpus."""
    columns = ("tissue", "licence", "origin")
    study = store.codes("study")
    rows = []
    for code, name in enumerate(store.manifest.columns["study"]):
        of = np.flatnonzero(study == code)
        labels = {column: store.manifest.columns[column][int(store.codes(column, of[:1])[0])] for column in columns}
        rows.append({"study": name, "cells": len(of), **labels})
    return sorted(rows, key=lambda row: -int(str(row["cells"])))


def curve(history: pd.DataFrame) -> list[dict[str, object]]:
    """Losses of held-out cells by step."""
    names = [name for name in history if name.startswith("validation/") and name != "validation/loss"]
    some = history.dropna(subset=names)
    epochs = history[["step", "epoch"]].dropna()
    return [
        {
            "step": int(row["step"]),
            "epoch": round(float(np.interp(row["step"], epochs["step"], epochs["epoch"], left=0.0)), 2),
            **{f"held-out {name.removeprefix('validation/')}": float(row[name]) for name in names},
        }
        for _, row in some.iterrows()
    ]


def facts(model: af.ScGPT) -> dict[str, object]:
    """Sizes of the model."""
    config = model.config.model
    genes, rows = len(model.vocab.genes), model.encoder.gene.weight.numel()
    profile = f", {rows:,} directions of genes in the profile" if config.profile else ""
    network = f"{config.n_layers} layers, {config.width} wide, {config.n_heads} heads, feed-forward {config.ff_width}"
    return {
        "network": network + (", with a profile: the cell embedding is the state of `<cls>` plus a linear reading" if profile else ""),
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}, {rows:,} of them rows of genes{profile}; float16",
        "vocabulary": f"{genes:,} genes, {genes - len(model.vocab.untrained):,} of them learned, the others marked untrained",
        "tokens": f"{model.tokenizer.values}, {model.tokenizer.n_bins} bins, at most {model.tokenizer.max_length:,} of a cell",
        "squared error": "GEP of asked genes, in bins; the first line is the mean over the held-out sets of the evaluation below",
    }


if __name__ == "__main__":
    main()
