"""Batch integration: annformer beside PCA, Harmony and scVI on the same cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Float, Shaped

from annformer.comparison.anchors import require_variable_genes
from annformer.comparison.cells import (
    blind_cells,
    colours_of,
    data_card,
    drawn_cells,
    labels_of,
    not_coloured,
    require_cells,
    require_shared_types,
    scored_cells,
)
from annformer.comparison.facts import INTEGRATION_PACKAGES, as_yaml, card_says, card_text, gene_lines, model_facts, version_facts
from annformer.comparison.kept import Kept, digest, plain_options
from annformer.comparison.methods import Made, Method, Run, choose, first_of, log_of, run_all, shuffled, threads_kept
from annformer.comparison.result import Comparison, Facts, Maps
from annformer.comparison.verdicts import PARTS, VERDICTS, caveats, held_against, sentence, unit_of, units_drawn, usable, verdict_table
from annformer.data.anndata import AnnDataSource, reading_quietly
from annformer.errors import input_error
from annformer.evaluate import integration
from annformer.evaluate.verdict import draws
from annformer.report import umap
from annformer.scgpt import DEFAULT_MODEL, ScGPT
from annformer.tasks._integration_recipe import IntegrationRecipe

log = logging.getLogger(__name__)

TUNED, SCRATCH, ZERO = "annformer fine-tuned", "annformer from scratch", "annformer zero-shot"
ANCHORS = "annformer anchors alone"
HELD_AGAINST: Final = {
    ANCHORS: "the places that the network is taught, without the network",
    SCRATCH: "the same training from random weights",
    ZERO: "no training on these cells",
}


def methods(model: ScGPT | str | Path = DEFAULT_MODEL, *, batch_key: str, **integrator: Any) -> dict[str, Method]:
    """Table of methods by name: ours, and every baseline. `integrator` holds options of `BatchIntegrator`."""
    from annformer.baselines import INTEGRATION, available
    from annformer.tasks._integration_cells import FEWEST_CELLS

    tuned = partial(_integrated, model, {"batch_key": batch_key, **integrator})
    recipe = _recipe(integrator)
    embedded = partial(_embedded, model, device=integrator.get("device"), threads=integrator.get("threads"))
    table = [
        Method(TUNED, "ours", partial(tuned, pretrained=True), fewest_cells=FEWEST_CELLS, resumes=True),
        Method(SCRATCH, "ours", partial(tuned, pretrained=False), fewest_cells=FEWEST_CELLS, resumes=True),
        Method(ZERO, "ours", embedded, random=False),
    ]
    if recipe.anchor_weight:  # what is not taught is nothing to compare with
        make = partial(_anchored, model, recipe, batch_key)
        table.append(Method(ANCHORS, "ours", make, fewest_cells=FEWEST_CELLS))
    for name, function in INTEGRATION.items():
        make = partial(_baseline, function, batch_key)
        table.append(Method(name, "floor", make, random=not name.startswith("PCA"), missing=available(name), slow=name.startswith("scVI")))
    return {method.name: method for method in table}


def _recipe(integrator: Mapping[str, Any]) -> IntegrationRecipe:
    given = integrator.get("recipe", "integrate")
    return given if isinstance(given, IntegrationRecipe) else IntegrationRecipe.named(str(given))


def _integrated(
    model: ScGPT | str | Path, options: Mapping[str, Any], cells: AnnData, seed: int, *, pretrained: bool, folder: Path | None = None
) -> Made:
    from annformer.tasks.integration import BatchIntegrator

    integrator = BatchIntegrator(model, **options, pretrained=pretrained, layer="X", seed=seed)
    integrator.fit(cells, folder=folder)
    integrator.transform(cells)
    return Made(np.asarray(cells.obsm["X_annformer"]), integrator.history_)


def _embedded(model: ScGPT | str | Path, cells: AnnData, seed: int, *, device: str | None, threads: int | None) -> Made:
    from annformer.tasks._threads import torch_threads
    from annformer.tasks.embedding import embed

    with torch_threads(threads):
        embed(cells, model, layer="X", seed=seed, progress=False, device=device)
    return Made(np.asarray(cells.obsm["X_annformer"]))


def _anchored(model: ScGPT | str | Path, recipe: IntegrationRecipe, batch_key: str, cells: AnnData, seed: int) -> Made:
    from annformer.comparison.anchors import anchors_of

    return Made(anchors_of(cells, model, recipe, batch_key=batch_key, seed=seed))


def _baseline(function: Any, batch_key: str, cells: AnnData, seed: int) -> Made:
    return Made(np.asarray(function(cells.X, cells.obs[batch_key].to_numpy(), seed=seed)))


def compare_integration(
    adata: AnnData,
    *,
    batch_key: str,
    label_key: str,
    model: ScGPT | str | Path = DEFAULT_MODEL,
    seeds: Sequence[int] = (0, 1, 2),
    wanted: Sequence[str] | None = None,
    table: Mapping[str, Method] | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    n_draws: int = 1_000,
    name: str = "cells in memory",
    command: str = "",
    folder: str | Path | None = None,
    **integrator: Any,
) -> Comparison:
    """Integrate the batches of `adata` with annformer and with the simple methods, score all of them, and judge ours.

    No method sees a label: each gets the counts, the names of the genes and the batches, and nothing else. `adata` is not changed.

    Parameters
    ----------
    adata
        Cells with counts; at least two batches and two types.
    batch_key
        Column of `obs` with the batch of every cell.
    label_key
        Column of `obs` with the type; cells with "unlabelled", "unknown" or nothing take no part in scores that need types.
    model
        The pretrained model.
    seeds
        Methods with randomness are run with each of them, the others with the first.
    wanted
        Names of methods; None: all that can run here.
    table
        Methods by name; None: those of `methods`.
    layer, gene_key
        As for `embed`.
    n_draws
        Bootstrap draws under a verdict.
    name
        What the cells are called on the page.
    command
        What makes the same comparison again.
    folder
        Keeps what finished runs returned, so that the same call goes on after a kill. Nobody removes it. With a `table` of your own
        nothing is kept: nobody could tell whether its functions are the same.
    **integrator
        Further options of `BatchIntegrator`, such as `recipe` or `threads`.
    """
    _require_scores()
    source = AnnDataSource(adata, gene_key=gene_key, layer=layer)
    labels = labels_of(source, label_key)
    cells = blind_cells(source, batch_key)
    batches = cells.obs[batch_key].to_numpy()
    chosen, skipped = choose(methods(model, batch_key=batch_key, **integrator) if table is None else table, wanted)
    require_shared_types(labels, batches)
    require_cells(batches, batch_key, {method.name: method.fewest_cells for method in chosen})
    taught = table is None and any(method.name in (TUNED, SCRATCH, ANCHORS) for method in chosen)
    if taught:
        with reading_quietly():
            require_variable_genes(cells, model, _recipe(integrator), batch_key=batch_key)
    ours = next(method.name for method in chosen if method.kind == "ours")
    loaded = model if isinstance(model, ScGPT) else ScGPT.from_pretrained(model)
    with reading_quietly():
        source.match(loaded.vocab)  # refused here, under the names that the user knows
    genes = gene_lines(source, loaded, tuned=taught)
    for line in genes:
        log.info("%s", line)
    options = plain_options(IntegrationRecipe, "integrate", integrator)
    finished = Kept(folder if table is None else None, {"cells": digest(cells), "model": loaded.fingerprint, "options": options})
    with reading_quietly():
        runs = run_all(chosen, cells, seeds, finished)
    runs.append(shuffled(runs, ours, seeds[0]))
    kept = np.all([np.isfinite(run.made.embedding).all(axis=1) for run in runs], axis=0)
    scored = scored_cells(labels, batches, kept, seeds[0])
    log.info("scoring %d embeddings of %d cells, %d bootstrap draws of each", len(runs), scored.sum(), n_draws)
    with threads_kept():
        scores, drawn, per_label = score(runs, labels, batches, scored, n_draws=n_draws, seed=seeds[0])
        rows = drawn_cells(labels, kept, seeds[0])
        log.info("drawing %d cells on %d maps", len(rows), len(first_of(runs)))
        maps = {name: umap(embedding[rows], seed=seeds[0]) for name, embedding in first_of(runs).items()}
    means = scores.groupby(["method", "kind"], sort=False).mean(numeric_only=True).reset_index()
    n_units = units_drawn(batches[scored], labels[scored])
    verdicts = verdict_table(means, drawn, ours, n_units)
    parts = verdict_table(means, {name: some[:, len(VERDICTS) :] for name, some in drawn.items()}, ours, n_units, tuple(PARTS))
    n_left_out = int((~usable(drawn)).sum())
    if n_left_out:
        log.info("%d of %d bootstrap draws have no cell that tells types or mixing: left out", n_left_out, n_draws)
    n_labels = per_label["label"].nunique()
    card = "" if isinstance(model, ScGPT) else card_text(model)
    facts = Facts(
        cells=data_card(source, name, kept=kept, label_key=label_key, batch_key=batch_key, n_labels=n_labels)
        | ({"scored": f"{scored.sum():,} cells, drawn at random"} if scored.sum() < kept.sum() else {})
        | not_coloured(adata.obs, label_key, batch_key),
        cells_by=pd.crosstab(pd.Series(labels, name=label_key), pd.Series(batches, name=batch_key)),
        genes=genes,
        model=model_facts(loaded, card),
        card=card_says(card),
        command=command,
        versions=version_facts(INTEGRATION_PACKAGES, seeds=", ".join(map(str, seeds))),
        definitions=integration.DEFINITIONS,
        skipped=skipped,
        recipe=as_yaml(options["recipe"]) if taught else "",
    )
    return Comparison(
        task="integrate",
        ours=ours,
        scores=scores,
        verdicts=verdicts,
        unit=unit_of(batches[scored], labels[scored]),
        n_units=n_units,
        n_draws=n_draws,
        n_left_out=n_left_out,
        per_label=per_label,
        embeddings=first_of(runs),
        maps=Maps(rows, maps, colours_of(adata.obs, label_key, batch_key).iloc[rows]),
        history=log_of(runs),
        facts=facts,
        sentence=sentence(verdicts, means, parts=parts),
        notes=held_against(verdicts, HELD_AGAINST) + caveats(len(seeds)),
    )


def score(
    runs: Sequence[Run],
    labels: Shaped[np.ndarray, "cell"],
    batches: Shaped[np.ndarray, "cell"],
    kept: Bool[np.ndarray, "cell"],
    *,
    n_draws: int,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, Float[np.ndarray, "draw score"]], pd.DataFrame]:
    """Score every run on the kept cells.

    Returns
    -------
    One row per run; method -> the scores of `VERDICTS`, then those of `PARTS`, on every draw, averaged over its seeds; scores by method
    and type.
    """
    labels, batches = labels[kept], batches[kept]
    require_shared_types(labels, batches)
    units = batches if units_drawn(batches, labels) else None
    weights = [np.bincount(draw, minlength=len(labels)).astype(np.uint16) for draw in draws(units, labels, n_draws, seed)]
    rows, by_label = [], []
    drawn: dict[str, list[np.ndarray]] = {}
    for run in runs:
        parts = integration.integration_parts(run.made.embedding[kept], labels, batches, seed=seed)
        name = run.method.name
        cost = {"seconds": run.seconds, "memory_mb": run.memory_mb}
        rows.append({"method": name, "kind": run.method.kind, "seed": run.seed} | cost | parts.scores())
        on_draws = [parts.label_scores(weight.astype(np.float64)) for weight in weights]
        drawn.setdefault(name, []).append(np.array([[found[score] for score in (*VERDICTS, *PARTS)] for found in on_draws]))
        by_label.append(integration.per_label_scores(parts).assign(method=name))
    table = pd.concat(by_label).groupby(["method", "label"], sort=False).mean(numeric_only=True).reset_index()
    return pd.DataFrame(rows), {name: np.mean(some, axis=0) for name, some in drawn.items()}, table


def _require_scores() -> None:
    """Say it before the work: the scores come at its end."""
    if find_spec("scib_metrics") is None:
        found = "the scores of integration need scib-metrics, which is not installed"
        raise input_error(found, "the extra `evaluate`", "pip install 'annformer[evaluate]'")


compare = compare_integration
"""What the table of tasks calls."""
