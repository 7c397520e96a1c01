"""The parts of a fitted classifier beside the network: what reads expression, what weighs the parts, what tells known from new."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from annformer.baselines.expression import highly_variable
from annformer.data.anndata import AnnDataSource
from annformer.durations import in_words
from annformer.errors import input_error
from annformer.evaluate.classification import classification_scores
from annformer.tasks._annotation_cells import (
    Reference,
    expressed_genes,
    learnable,
    say_if_logarithms,
    select,
)
from annformer.tasks._linear_part import Fitted, Linear, fit_linear, fit_scaled
from annformer.tasks._novelty import Features, Novelty, Space, fit_novelty
from annformer.tasks._stack import Abroad, Stack, fit_stack
from annformer.tokens import CellBatch
from annformer.vocab import GeneVocab

log = logging.getLogger(__name__)

SAY_AFTER = 3.0
"""Seconds."""

CELLS_AT_ONCE = 1024
SCALED_TO = 10_000.0
"""Counts to which cells are scaled before the logarithm of the scaled genes."""
NETWORK = "network"
"""Name of the part that the network is."""


class Answer(NamedTuple):
    """What is said of some cells."""

    log_probabilities: Float[np.ndarray, "cell type"]
    codes: Int[np.ndarray, "cell"]
    novelty: Float[np.ndarray, "cell"]
    empty: Bool[np.ndarray, "cell"]
    """Cells without any expressed gene that the model knows: nothing is known of them."""
    parts: dict[str, Int[np.ndarray, "cell"]]
    """What each part alone would call them: `expression`, `network`."""


class NetworkPart(NamedTuple):
    """What the network says of the reference."""

    logits: Float[np.ndarray, "held_back type"]
    """Of the cells that it, or what reads its embedding, did not learn from."""
    rows: Int[np.ndarray, "held_back"]
    abroad: Float[np.ndarray, "cell type"] | None
    """Likewise, of all cells, by a head that learned from the other strata; None where there are none, or the network is tuned."""
    head: Linear | None
    """From the frozen embedding to logits; None where the network has a head of its own."""
    states: Float[np.ndarray, "cell width"]
    """What the head reads of all cells of the reference."""


class Said(NamedTuple):
    """What the network says of some cells."""

    logits: Float[np.ndarray, "cell type"]
    states: Float[np.ndarray, "cell width"]


@dataclass(frozen=True)
class Classifier:
    """From expression, and what the network says, to an answer."""

    genes: Int[np.ndarray, "gene"]
    """Ids of the genes that the linear parts read."""
    measured: Int[np.ndarray, "measured"]
    """Ids of all genes of the reference: over them the size of a cell is counted."""
    depths: tuple[float, ...]
    """Counts to which cells are scaled before the logarithm, one for each linear part; the last is that of the novelty."""
    linears: tuple[Linear, ...]
    head: Linear | None
    stack: Stack
    novelty: Novelty
    alone: dict[str, Stack]
    """The parts by themselves, `expression` and `network`: likewise weighed and tilted."""
    held_back: dict[str, float]
    """Scores, of all parts together and of each alone, on the cells that no part had learned from; their weights, few numbers, did."""

    @classmethod
    def fit(
        cls,
        reference: Reference,
        network: NetworkPart | None,
        *,
        depths: Sequence[float],
        strengths: Sequence[float],
        balance: float,
        scaled_genes: int,
        scaled_strengths: Sequence[float],
    ) -> Self:
        """Fit the linear parts on the folds of the reference, then weigh all parts by the cells that none of them had learned from.

        Where no batches are known, what the parts are worth beside each other is told by cells of another depth than those learned from
        as well: among cells alike the network may seem worth much that other cells, which is what a query is, do not bear out.
        """
        cells, codes, n_types = reference.cells.whole, reference.codes, len(reference.types)
        genes = expressed_genes(reference.cells)
        selected = select(cells, genes, cells.gene_ids)
        median = float(np.median(selected.sizes))
        told = learnable(codes, reference.folds)
        held_back = np.flatnonzero(told) if network is None else network.rows[told[network.rows]]
        strata = reference.strata if network is not None and network.abroad is not None else None
        abroad_rows = np.zeros(0, np.int64) if strata is None else np.flatnonzero(learnable(codes, strata)[held_back])
        linears, parts, abroad = [], [], []
        folds, counts = reference.folds, [depth * median for depth in depths]

        def at_depth(depth: float) -> Fitted:
            return fit_linear(selected.at(depth), codes, n_types, folds, strengths=strengths, balance=balance, strata=strata)

        def scaled() -> Fitted:
            varying = np.flatnonzero(highly_variable(sp.csr_matrix(selected.counts), None, scaled_genes).genes)
            return fit_scaled(selected.at(SCALED_TO), varying, codes, n_types, folds, strengths=scaled_strengths, strata=strata)

        jobs: list[Callable[[], Fitted]] = [*(partial(at_depth, depth) for depth in counts), *([scaled] if scaled_genes else [])]
        counts += [SCALED_TO] if scaled_genes else []
        for depth, fitted in zip(counts, _one_by_one(jobs), strict=True):
            log.debug("log expression at %g counts: strength %g", depth, fitted.strength)
            linears.append(fitted.linear)
            parts.append(fitted.out_of_fold[held_back])
            if fitted.out_of_stratum is not None:
                abroad.append(fitted.out_of_stratum[held_back][abroad_rows])
        if network is not None:
            parts.append(network.logits[told[network.rows]])
            if network.abroad is not None:
                abroad.append(network.abroad[held_back][abroad_rows])
        sizes, truth = np.bincount(codes, minlength=n_types), codes[held_back]
        stack = fit_stack(parts, truth, sizes, abroad=Abroad(abroad, abroad_rows) if len(abroad_rows) else None)
        logs, n = stack.log_probabilities(parts), len(linears)
        groups = {"expression": parts[:n], NETWORK: parts[n:]}
        alone = {name: fit_stack(group, truth, sizes) for name, group in groups.items() if group}
        views: list[Features] = [selected.at(median), *([] if network is None else [network.states])]
        novelty = fit_novelty(views, codes, n_types, reference.folds, held_back, 1 - np.exp(logs.max(axis=1)))
        called = {"": stack.called(logs)} | {f"{name}_": one.called(one.log_probabilities(groups[name])) for name, one in alone.items()}
        scores = _scores(truth, called | {"majority_": np.full(len(truth), sizes.argmax())})
        head = None if network is None else network.head
        return cls(genes, cells.gene_ids, (*counts, median), tuple(linears), head, stack, novelty, alone, scores)

    def part_weights(self, *, scaled: bool) -> dict[str, float]:
        """What the parts are worth; `scaled`: the last of the linear ones reads scaled variable genes."""
        names = [f"expression at {depth:,.0f} counts" for depth in self.depths[: len(self.linears)]]
        if scaled and names:
            names[-1] = "variable genes, scaled"
        return dict(zip([*names, NETWORK], map(float, self.stack.weights), strict=False))

    def read(self, source: AnnDataSource, vocab: GeneVocab) -> tuple[list[Float[np.ndarray, "cell type"]], Float[np.ndarray, "cell"]]:
        """Logits of the linear parts, and distance in expression to the nearest type, of all cells; NaN where no gene is expressed."""
        say_if_logarithms(source)
        blocks = [self._read(cells.in_counts()) for cells in source.batches(CELLS_AT_ONCE, vocab=vocab)]
        return [np.concatenate(part) for part in zip(*(logits for logits, _ in blocks), strict=True)], np.concatenate(
            [far for _, far in blocks]
        )

    def _read(self, cells: CellBatch) -> tuple[list[np.ndarray], np.ndarray]:
        selected = select(cells, self.genes, self.measured)
        missing = selected.missing
        logits = [
            linear.logits(selected.at(depth)) + linear.mean[missing] @ linear.weight[missing]
            for depth, linear in zip(self.depths, self.linears, strict=False)
        ]
        far = self.novelty.spaces[0].distance(selected.at(self.depths[-1]), missing)
        far[np.diff(cells.counts.indptr) == 0] = np.nan
        return logits, far

    def answer(
        self,
        linear: Sequence[Float[np.ndarray, "cell type"]],
        network: Said | None,
        far: Float[np.ndarray, "cell"],
    ) -> Answer:
        """Weigh what the parts say; a cell without any expressed gene is as novel as can be."""
        parts = [*linear, *([] if network is None else [np.nan_to_num(network.logits)])]
        logs = self.stack.log_probabilities(parts)
        empty = ~np.isfinite(far)
        distances = [np.nan_to_num(far), *([] if network is None else [self.novelty.spaces[1].distance(network.states)])]
        novelty = self.novelty.of(distances, 1 - np.exp(logs.max(axis=1)))
        novelty[empty] = 1.0
        given = {"expression": list(linear), NETWORK: parts[len(linear) :]}
        alone = {name: one.called(one.log_probabilities(given[name])) for name, one in self.alone.items()}
        return Answer(logs, self.stack.called(logs), novelty, empty, alone)

    def tensors(self) -> dict[str, Tensor]:
        """All numbers, to be saved."""
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self._arrays()}

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "genes", self.genes
        yield "measured", self.measured
        yield "depths", np.array(self.depths)
        named = {f"linear.{number}": linear for number, linear in enumerate(self.linears)}
        if self.head is not None:
            named["head"] = self.head
        named |= {f"alone.{name}": one for name, one in self.alone.items()}  # type: ignore[misc]
        named |= {f"space.{number}": space for number, space in enumerate(self.novelty.spaces)}  # type: ignore[misc]
        named |= {"stack": self.stack, "novelty": self.novelty}  # type: ignore[dict-item]
        for prefix, values in named.items():
            for name, array in values._asdict().items():
                if isinstance(array, np.ndarray):
                    yield f"{prefix}.{name}", array

    @classmethod
    def load(cls, path: Path, held_back: dict[str, float]) -> Self:
        """Read what was saved of `tensors`.

        Raises
        ------
        InputError
            When the file is missing or not complete.
        """
        try:
            arrays = load_file(path)
            n = sum(name.startswith("linear.") and name.endswith(".weight") for name in arrays)
            linears = tuple(Linear(**_of(arrays, f"linear.{number}.")) for number in range(n))
            head = Linear(**_of(arrays, "head.")) if "head.weight" in arrays else None
            n_spaces = sum(name.startswith("space.") and name.endswith(".mean") for name in arrays)
            spaces = tuple(Space(**_of(arrays, f"space.{number}.")) for number in range(n_spaces))
            novelty = Novelty(spaces=spaces, **_of(arrays, "novelty."))
            stack = Stack(**_of(arrays, "stack."))
            parts = [name for name in ("expression", NETWORK) if f"alone.{name}.weights" in arrays]
            alone = {name: Stack(**_of(arrays, f"alone.{name}.")) for name in parts}
            depths = tuple(map(float, arrays["depths"]))
            return cls(arrays["genes"], arrays["measured"], depths, linears, head, stack, novelty, alone, held_back)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            found = f"{path} cannot be read: {error}"
            raise input_error(found, "the file as CellTypeClassifier.save wrote it", "copy the folder again, or fit again") from None


def _one_by_one(jobs: Sequence[Callable[[], Fitted]]) -> Iterator[Fitted]:
    """Learn from expression; say how long it will take, once the first part took long."""
    began = time.monotonic()
    for done, job in enumerate(jobs, 1):
        fitted, took = job(), time.monotonic() - began
        if took > SAY_AFTER and done < len(jobs):
            left = in_words(took / done * (len(jobs) - done))
            log.info("expression, part %d of %d: %s; about %s left", done, len(jobs), in_words(took), left)
        yield fitted


def _scores(truth: Int[np.ndarray, "cell"], called: Mapping[str, Int[np.ndarray, "cell"]]) -> dict[str, float]:
    """Scores of each way to call the cells, under its name."""
    scores = {name: classification_scores(truth, said) for name, said in called.items()}
    return {f"{name}{score}": found[score] for name, found in scores.items() for score in ("accuracy", "macro_f1")}


def _of(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
