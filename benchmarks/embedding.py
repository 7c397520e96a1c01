"""Embedding cells, ours against the original's network in the way it ships, with the same weights.

    python benchmarks/embedding.py CELLS.h5ad --parity FOLDER

Two tables. The first is the network alone on the same tokens: the original as PyTorch ships it (nested-tensor fast path on), with the fast
path off (about twice as fast on CPU), and ours. The second is end to end, counts in memory to normalised embeddings: the original's way
against `annformer.embed`. Nothing is printed before `original.prove` passes and both networks agree on the cells at hand.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import annformer as af
from _timing import Timing, alternate, cpu_ratio, machine, matmul_peak, print_table, ratio
from annformer.convert import from_authors
from annformer.inference import TOKENS_PER_FORWARD, _side_by_side
from annformer.scgpt import ModelFolderConfig
from annformer.tokenizer import tokenize
from annformer.tokens import TokenBatch
from original import PAD_VALUE, TOLERANCE, Original, embed_data, prove, slow_path

N_TOKENS = 60_697  # of the published vocabulary: the gene table must not fit into a cache


class Size(NamedTuple):
    """A network to measure, cells per block and the least ratios wanted against the original as shipped and with the fast path off."""

    width: int
    n_heads: int
    n_layers: int
    n_cells: int
    bars: tuple[float, float]


SIZES = {
    "tiny": Size(16, 2, 1, 4, (0.0, 0.0)),
    "128": Size(128, 4, 6, 64, (5.0, 2.5)),
    "512": Size(512, 8, 12, 4, (2.3, 1.3)),
}


class Block(NamedTuple):
    """The same cells for all ways: packed for ours, padded for the original."""

    packs: list[TokenBatch]
    genes: Tensor
    values: Tensor
    lengths: Tensor


def networks(size: Size, vocab: af.GeneVocab) -> tuple[Original, af.ScGPT]:
    """The original's network with random weights, and ours with the same."""
    torch.manual_seed(0)
    original = Original(len(vocab), size.width, size.n_heads, size.width, size.n_layers, pad_id=vocab.pad_id, cls_id=vocab.cls_id).eval()
    with torch.no_grad():
        for weight in original.parameters():
            if weight.ndim == 1:  # biases and norms start as zeros and ones, which would hide an error
                weight += 0.1 * torch.randn_like(weight)
    args = {"embsize": size.width, "nheads": size.n_heads, "d_hid": size.width, "nlayers": size.n_layers}
    converted = from_authors(args, original.state_dict(), vocab, drop=("gep", "gepc"))
    ours = af.ScGPT(ModelFolderConfig(model=converted.model, tokenizer=converted.tokenizer), vocab)
    ours.load_state_dict(converted.weights)
    return original, ours.eval()


def vocabulary(names: Sequence[str], n_tokens: int) -> af.GeneVocab:
    """The file's genes and as many others as the published vocabulary has."""
    genes = list(dict.fromkeys(names))
    return af.GeneVocab([*genes, *(f"OTHER{i}" for i in range(n_tokens - 3 - len(genes)))]).with_specials()


def blocks(adata: anndata.AnnData, ours: af.ScGPT, n_cells: int, n: int) -> list[Block]:
    """Tokens of `n` consecutive runs of cells."""
    batches = af.AnnDataSource(adata).batches(n_cells, vocab=ours.vocab)
    return [_block(tokenize(next(batches), ours.tokenizer, cls_id=ours.vocab.cls_id), ours.vocab.pad_id) for _ in range(n)]


def _block(tokens: TokenBatch, pad_id: int) -> Block:
    lengths = tokens.offsets.diff()
    genes, values = (part.split(lengths.tolist()) for part in (tokens.gene_ids, tokens.values))
    padded = pad_sequence(genes, batch_first=True, padding_value=pad_id), pad_sequence(values, batch_first=True, padding_value=PAD_VALUE)
    return Block(list(_packs(tokens)), *padded, lengths)


def _packs(tokens: TokenBatch) -> Iterator[TokenBatch]:
    """Forwards of at most about as many tokens as `annformer.embed` gives its network on a CPU; an even number, for two threads."""
    n_packs = 2 * -(-tokens.n_tokens // (2 * TOKENS_PER_FORWARD["cpu"]))
    for cells in torch.arange(tokens.n_cells).tensor_split(n_packs):
        first, last = int(cells[0]), int(cells[-1]) + 1
        begin, end = tokens.offsets[first], tokens.offsets[last]
        yield tokens._replace(
            gene_ids=tokens.gene_ids[begin:end],
            values=tokens.values[begin:end],
            offsets=tokens.offsets[first : last + 1] - begin,
            n_visible=tokens.n_visible[first:last],
        )


def gflop(lengths: Tensor, size: Size) -> float:
    """Floating-point work that cell embeddings need at least, in units of 1e9: the last layer only for `<cls>`, no padding."""
    n_tokens, n_pairs = float(lengths.sum()), float(lengths.double().square().sum())
    full_layer = 2 * 6 * size.width**2 * n_tokens + 4 * size.width * n_pairs
    last_layer = 2 * 2 * size.width**2 * n_tokens
    return ((size.n_layers - 1) * full_layer + last_layer) / 1e9


def same_embeddings(original: Original, ours: af.ScGPT, block: Block) -> float:
    """Largest relative difference between both networks' cell states; stops the run when it is more than rounding."""
    found = torch.cat([ours.encode(pack, wanted="cell").cell for pack in block.packs])
    expected = _states(original, block)
    difference = float((found - expected).abs().max() / (1 + expected.abs().max()))
    if not difference <= TOLERANCE:
        msg = f"the networks differ by {difference:.1e} (allowed {TOLERANCE}): no ratio is printed"
        raise SystemExit(msg)
    return difference


def _states(original: Original, block: Block) -> Tensor:
    return original.encode(block.genes, block.values, block.genes == original.pad_id)[:, 0]


def measure_network(original: Original, ours: af.ScGPT, cells: list[Block], threads: int) -> dict[str, Timing]:
    """Seconds per block, of the three ways in turn."""

    @torch.inference_mode()
    def fast_path_on(i: int) -> None:
        _states(original, cells[i])

    def fast_path_off(i: int) -> None:
        with slow_path():
            fast_path_on(i)

    @torch.inference_mode()
    def encode(pack: TokenBatch) -> Tensor:
        return ours.encode(pack, wanted="cell").cell

    def packed(i: int) -> None:  # as annformer.embed does it: forwards side by side, a thread each
        list(_side_by_side(encode, cells[i].packs, threads))

    torch.set_num_threads(threads)
    return alternate({"shipped": fast_path_on, "off": fast_path_off, "ours": packed}, n=len(cells))


def network_table(adata: anndata.AnnData, options: argparse.Namespace) -> None:
    rows, cpu_rows = [], []
    for name in options.sizes:
        size = SIZES[name]
        original, ours = networks(size, vocabulary(adata.var_names, options.n_tokens))
        n_cells = options.cells or size.n_cells
        cells = blocks(adata, ours, n_cells, options.rounds)
        work = float(np.median([gflop(block.lengths, size) for block in cells]))
        with torch.inference_mode():
            difference = same_embeddings(original, ours, cells[0])
        for threads in options.threads:
            took, peak = measure_network(original, ours, cells, threads), matmul_peak()
            rates = [n_cells / took[way].seconds for way in ("shipped", "off", "ours")]
            ratios = [ratio(took[way], took["ours"]) for way in ("shipped", "off")]
            in_cpu = [cpu_ratio(took[way], took["ours"]) for way in ("shipped", "off")]
            achieved = work / min(took["ours"].wall)
            network, bars = f"{size.width} x {size.n_layers}", f"{size.bars[0]:g} / {size.bars[1]:g}"
            rows.append([network, threads, *rates, *ratios, bars, _met(ratios, size), achieved, peak, achieved / peak, f"{difference:.0e}"])
            cpu_rows.append([network, threads, *in_cpu, bars, _met(in_cpu, size), took["ours"].spread])
    columns = ["network", "threads", "as shipped", "fast path off", "ours", "ours/shipped", "ours/off", "bars", "met"]
    columns += ["GFLOP/s", "peak", "share", "difference"]
    print_table("Network alone, same tokens and weights, cells/s of wall time", columns, rows)
    columns = ["network", "threads", "ours/shipped", "ours/off", "bars", "met", "slowest/fastest round"]
    print_table("The same in CPU seconds of all threads, which other work on the machine disturbs less", columns, cpu_rows)


def _met(ratios: Sequence[float], size: Size) -> bool:
    return all(found >= bar for found, bar in zip(ratios, size.bars, strict=True))


def end_to_end_table(adata: anndata.AnnData, options: argparse.Namespace) -> None:
    rows = []
    for name in options.sizes:
        size = SIZES[name]
        original, ours = networks(size, vocabulary(adata.var_names, options.n_tokens))
        n_cells = options.cells or size.n_cells
        parts = [adata[i * n_cells : (i + 1) * n_cells].copy() for i in range(options.rounds)]
        gene_ids = ours.vocab.ids(adata.var_names)
        for threads in options.threads:
            torch.set_num_threads(threads)
            took = alternate(_end_to_end(original, ours, parts, gene_ids), n=options.rounds)
            rates = [n_cells / timing.seconds for timing in took.values()]
            ratios = [ratio(took[way], took["ours"]) for way in ("shipped", "off")]
            rows.append([f"{size.width} x {size.n_layers}", threads, *rates, *ratios])
    columns = ["network", "threads", "as shipped", "fast path off", "annformer.embed", "ours/shipped", "ours/off"]
    print_table(
        "End to end, counts in memory to embeddings, cells/s of wall time (the original's two loader processes come on top of its threads)",
        columns,
        rows,
    )


def _end_to_end(original: Original, ours: af.ScGPT, parts: list[anndata.AnnData], gene_ids: np.ndarray) -> dict[str, Any]:
    def shipped(i: int) -> None:
        embed_data(original, parts[i].X.toarray(), gene_ids)

    def off(i: int) -> None:
        with slow_path():
            shipped(i)

    return {"shipped": shipped, "off": off, "ours": lambda i: af.embed(parts[i], ours, progress=False)}


TABLES = {"network": network_table, "end_to_end": end_to_end_table}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prove, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells_file", type=Path, help="h5ad with counts, gene symbols as var_names")
    parser.add_argument("--parity", type=Path, default=Path(__file__).parents[1] / "tests" / "golden", help="folder with a_pretrain/")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["128", "512"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, help="cells per block; by default 64 for 128 wide, 4 for 512 wide")
    parser.add_argument("--n_tokens", type=int, default=N_TOKENS, help="size of the vocabulary")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    proved = max(prove(options.parity).values())
    print(f"The imitation of the original reproduces its golden data to {proved:.0e}. {machine()}.")
    threads = torch.get_num_threads()
    adata = anndata.read_h5ad(options.cells_file)
    for name in options.tables:
        TABLES[name](adata, options)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
