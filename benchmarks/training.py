"""A step of generative pretraining, ours against the original's, with the same weights, cells and questions.

    python benchmarks/training.py CELLS.h5ad

A step is forward, all losses, backward, clipping at 1 and the optimizer: Adam as the original's script calls it, our fused AdamW. The
original drops attention probabilities while it trains, which on a CPU costs more than all the rest; ours leaves that off unless told.
So there are two comparisons: the original as it ships against ours as it ships, and both without any dropout, where the losses must first
agree to 1e-5. Nothing is printed before that, nor before `original.prove` passes.
"""

from __future__ import annotations

import argparse
import resource
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import annformer as af
from _timing import Timing, alternate, cpu_ratio, machine, print_table, ratio
from annformer.convert import from_authors
from annformer.masking import ask
from annformer.scgpt import ModelFolderConfig
from annformer.tokenizer import tokenize
from annformer.tokens import TokenBatch
from embedding import N_TOKENS, vocabulary
from original import PAD_VALUE, Original, generative_losses, prove, training_step

LOSS_TOLERANCE = 1e-5
DROPOUT = 0.2
LEARNING_RATE = 1e-4


class Size(NamedTuple):
    """A network, and how many passes its step makes: the second generates from the cell embedding alone."""

    width: int
    n_heads: int
    n_layers: int
    passes: int

    def __str__(self) -> str:
        return f"{self.width} x {self.n_layers}"


SIZES = {
    "tiny": Size(16, 2, 1, 2),
    "128x6": Size(128, 4, 6, 1),
    "128x6-2": Size(128, 4, 6, 2),
    "128x4-2": Size(128, 4, 4, 2),
}


class Questions(NamedTuple):
    """The same cells and asked genes for all ways: packed for ours, two padded streams for the original."""

    packed: TokenBatch
    padded: tuple[Tensor, Tensor, Tensor, Tensor]
    """Perceived genes, their values, asked genes, their values."""


class Way(NamedTuple):
    """One way to train, measured in turn with the others."""

    ours: bool
    dropout: float
    attention_dropout: float = 0.0
    precision: torch.dtype = torch.float32


WAYS = {
    "original": Way(ours=False, dropout=DROPOUT, attention_dropout=DROPOUT),
    "original, no dropout": Way(ours=False, dropout=0.0),
    "ours": Way(ours=True, dropout=DROPOUT),
    "ours, no dropout": Way(ours=True, dropout=0.0),
    "ours, attention dropout too": Way(ours=True, dropout=DROPOUT, attention_dropout=DROPOUT),
    "ours, bf16": Way(ours=True, dropout=DROPOUT, precision=torch.bfloat16),
}
PAIRS = (
    ("as each ships", "original", "ours"),
    ("no dropout on either side", "original, no dropout", "ours, no dropout"),
    ("attention dropout on both sides", "original", "ours, attention dropout too"),
    ("as each ships, ours in bf16", "original", "ours, bf16"),
)


def original_network(size: Size, vocab: af.GeneVocab, dropout: float) -> Original:
    """The original's network with random weights, the same for every call."""
    torch.manual_seed(0)
    sizes = size.width, size.n_heads, size.width, size.n_layers
    original = Original(len(vocab), *sizes, pad_id=vocab.pad_id, cls_id=vocab.cls_id, dropout=dropout)
    with torch.no_grad():
        for weight in original.parameters():
            if weight.ndim == 1:  # biases and norms start as zeros and ones, which would hide an error
                weight += 0.1 * torch.randn_like(weight)
    return original.train()


def our_network(size: Size, vocab: af.GeneVocab, way: Way) -> af.ScGPT:
    """Ours with the weights of `original_network`."""
    original = original_network(size, vocab, 0.0)
    args = {"embsize": size.width, "nheads": size.n_heads, "d_hid": size.width, "nlayers": size.n_layers}
    converted = from_authors(args, original.state_dict(), vocab)
    model = converted.model.with_(dropout=way.dropout, attention_dropout=way.attention_dropout)
    objectives = converted.objectives | {"gep": converted.objectives["gep"] | {"cell_prompt": size.passes == 2}}
    config = ModelFolderConfig.model_validate({"model": model, "tokenizer": converted.tokenizer, "objectives": objectives})
    ours = af.ScGPT(config, vocab)
    ours.load_state_dict(converted.weights)
    return ours.train()


def questions(adata: anndata.AnnData, vocab: af.GeneVocab, options: argparse.Namespace) -> list[Questions]:
    """Tokens of one run of cells per round, a share of their genes asked."""
    settings = af.TokenizerSettings.model_validate({"max_length": options.max_length})
    batches = af.AnnDataSource(adata).batches(options.cells, vocab=vocab)
    tokenized = (tokenize(next(batches), settings, cls_id=vocab.cls_id) for _ in range(options.rounds))
    return [_in_both_forms(ask(tokens, [options.share], seed=0, step=step), vocab.pad_id) for step, tokens in enumerate(tokenized)]


def _in_both_forms(tokens: TokenBatch, pad_id: int) -> Questions:
    lengths = tokens.offsets.diff()
    sizes = torch.stack((tokens.n_visible, lengths - tokens.n_visible), 1).flatten().tolist()
    genes, values, targets = (part.split(sizes) for part in (tokens.gene_ids, tokens.values, tokens.targets))
    pairs = (genes[::2], pad_id), (values[::2], PAD_VALUE), (genes[1::2], pad_id), (targets[1::2], PAD_VALUE)
    padded = tuple(pad_sequence(parts, batch_first=True, padding_value=filler) for parts, filler in pairs)
    return Questions(tokens, padded)


def optimizer_of(model: torch.nn.Module, way: Way) -> torch.optim.Optimizer:
    """Adam as the original's script builds it, or fused AdamW."""
    if way.ours:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def our_losses(model: af.ScGPT, tokens: TokenBatch) -> list[Tensor]:
    """Mean losses in the order of the original's: asked values, from the cell embedding, from the given cell."""
    losses = model.losses(tokens)
    return [losses[name].mean for name in ("gep", "gepc", "gep_cell_prompt") if name in losses]


def our_step(model: af.ScGPT, optimizer: torch.optim.Optimizer, tokens: TokenBatch, precision: torch.dtype) -> None:
    """One step as `annformer pretrain` makes it."""
    with torch.autocast(tokens.values.device.type, precision, enabled=precision != torch.float32):
        total = torch.stack(our_losses(model, tokens)).sum()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def stepper(size: Size, way: Way, vocab: af.GeneVocab, cells: Sequence[Questions]) -> Callable[[int], None]:
    """Build network and optimizer; the result trains on the cells of a round."""
    if way.ours:
        ours = our_network(size, vocab, way)
        optimizer = optimizer_of(ours, way)
        return lambda i: our_step(ours, optimizer, cells[i].packed, way.precision)
    original = original_network(size, vocab, way.dropout)
    optimizer = optimizer_of(original, way)
    return lambda i: training_step(original, optimizer, cells[i].padded, passes=size.passes) and None


def same_losses(size: Size, vocab: af.GeneVocab, cells: Questions) -> float:
    """Largest relative difference between the losses of both networks without dropout; stops the run when it is more than rounding."""
    with torch.no_grad():
        expected = torch.stack(generative_losses(original_network(size, vocab, 0.0), *cells.padded, passes=size.passes))
        found = torch.stack(our_losses(our_network(size, vocab, WAYS["ours, no dropout"]), cells.packed))
    difference = float(((found - expected) / expected).abs().max())
    if not difference <= LOSS_TOLERANCE:
        msg = f"the losses differ by {difference:.1e} (allowed {LOSS_TOLERANCE}): no ratio is printed"
        raise SystemExit(msg)
    return difference


def peak_memory(step: Callable[[int], None]) -> float:
    """MiB that two steps need at most beyond what the process had before, measured in a copy of the process."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(step, sender))
    child.start()
    sender.close()
    peak = receiver.recv()
    child.join()
    return peak


def _send_peak(step: Callable[[int], None], sender: Connection) -> None:
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(2):  # the first one builds the state of the optimizer
        step(0)
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def table(name: str, adata: anndata.AnnData, options: argparse.Namespace) -> None:
    """Check, measure and print one network."""
    size = SIZES[name]
    vocab = vocabulary(adata.var_names, options.n_tokens)
    cells = questions(adata, vocab, options)
    difference = same_losses(size, vocab, cells[0])
    memory = {way: peak_memory(stepper(size, WAYS[way], vocab, cells)) for way in WAYS} if options.memory else {}
    took = alternate({way: stepper(size, WAYS[way], vocab, cells) for way in WAYS}, n=options.rounds)
    n_tokens = float(np.median([round_.packed.n_tokens for round_ in cells]))
    passes = "one pass" if size.passes == 1 else "two passes"
    title = f"{size}, {passes}, {options.cells} cells, {n_tokens:,.0f} tokens, {options.share:g} asked; losses differ by {difference:.0e}"
    rows = [
        [way, t.seconds, t.cpu_seconds, options.cells / t.seconds, n_tokens / t.seconds, memory.get(way, "")] for way, t in took.items()
    ]
    print_table(title, ["way", "s / step", "CPU-s / step", "cells/s", "tokens/s", "MiB"], rows)
    print_table("Ratios, round by round", ["comparison", "wall", "CPU", "slowest/fastest round"], [_row(took, *pair) for pair in PAIRS])


def _row(took: dict[str, Timing], title: str, slow: str, fast: str) -> list[object]:
    return [title, ratio(took[slow], took[fast]), cpu_ratio(took[slow], took[fast]), took[fast].spread]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prove, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells_file", type=Path, help="h5ad with counts, gene symbols as var_names")
    parser.add_argument("--parity", type=Path, default=Path(__file__).parents[1] / "tests" / "golden", help="folder with a_pretrain/")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["128x6", "128x4-2"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=8, help="cells of a step")
    parser.add_argument("--max_length", type=int, default=1200, help="most tokens of a cell")
    parser.add_argument("--share", type=float, default=0.5, help="share of the genes that is asked")
    parser.add_argument("--n_tokens", type=int, default=N_TOKENS, help="size of the vocabulary")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well (Linux)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    proved = max(prove(options.parity).values())
    print(f"The imitation of the original reproduces its golden data to {proved:.0e}. {machine()}, {options.threads} threads.")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    adata = anndata.read_h5ad(options.cells_file)
    for name in options.sizes:
        table(name, adata, options)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
