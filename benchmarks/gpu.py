"""A GPU at the paper's shape: are the attention back ends equal there, and how fast are training and embedding.

    python benchmarks/gpu.py                        # a table; needs a CUDA device
    python benchmarks/gpu.py --check                # nothing but whether it could run
    python benchmarks/gpu.py --device cpu --tiny    # the same from end to end, small and slow

12 layers, 512 wide, 8 heads, a vocabulary of 60,697 tokens: 51 million parameters. A step is the whole of generative pretraining: GEP and
GEPC, forward, backward, clipping, fused AdamW, in bf16, on cells of 1,024 and of 1,200 genes, half of them asked, drawn anew for
every step and brought over from the host. Cells and tokens per second count what was trained on. MFU counts the work of
`annformer.train.flops.step_flops`, which leaves out what the visible/asked rule spares, so less work for the same cells cannot raise
it. The rows "all visible" hide values instead of asking: attention of all tokens to all, as in the published 842 cells/s on one H100.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import annformer as af
from _timing import print_table
from annformer.masking import ask, hide_values
from annformer.model.attention import Layout, attend
from annformer.scgpt import ModelFolderConfig
from annformer.tokens import TokenBatch
from annformer.train.flops import batch_flops, peak_flops, step_flops

PUBLISHED = 842  # cells/s of 1,024 genes, one H100, bf16, 51 M parameters
AIM = 1_700  # on an H200
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}


class Shape(NamedTuple):
    """A network, and on how many cells it is measured at a time."""

    width: int
    n_heads: int
    n_layers: int
    n_tokens: int
    """Of the vocabulary."""
    n_cells: int
    n_embedded: int
    genes: tuple[int, ...]


PAPER = Shape(512, 8, 12, 60_697, 96, 256, (1024, 1200))
TINY = Shape(32, 2, 2, 200, 4, 4, (60,))


def network(shape: Shape, cell_prompt: bool) -> af.ScGPT:
    """With random weights."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": shape.n_tokens,
        "width": shape.width,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "ff_width": shape.width,
    }
    objectives = {"gep": {"kind": "gep", "cell_prompt": cell_prompt}, "gepc": {"kind": "gepc"}}
    config = ModelFolderConfig.model_validate({"model": sizes, "objectives": objectives})
    vocab = af.GeneVocab(["<pad>", "<cls>", *(f"GENE{i}" for i in range(shape.n_tokens - 2))])
    return af.ScGPT(config, vocab)


def cells(shape: Shape, n_cells: int, n_genes: int, seed: int, ragged: bool = False) -> TokenBatch:
    """Random genes with random bins, `<cls>` first; `ragged`: between a quarter and all of `n_genes`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(n_genes // 4, n_genes + 1, n_cells) if ragged else np.full(n_cells, n_genes)
    ids = [np.concatenate(([1], 2 + rng.permutation(shape.n_tokens - 2)[: length - 1])) for length in lengths]
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))))
    values = torch.from_numpy(rng.integers(1, 51, int(offsets[-1])).astype(np.float32))
    values[offsets[:-1]] = -2
    return TokenBatch(torch.from_numpy(np.concatenate(ids)), values, None, None, offsets, offsets.diff(), None, None, {}, None)


def equality_table(device: torch.device, shape: Shape) -> bool:
    """Compare the back end that the device would choose with the boolean mask; return whether it is within tolerance everywhere."""
    rows = []
    for mode, ragged, dtype in [(m, r, t) for t in TOLERANCE for m in QUESTIONS for r in (False, True)]:
        tokens = QUESTIONS[mode](cells(shape, 4, shape.genes[0], 0, ragged), 0).to(device)
        layout = Layout.of(tokens)
        differences = _differences(tokens.n_tokens, shape, dtype, layout)
        ok = all(difference <= bar for difference, bar in zip(differences, (TOLERANCE[dtype], 2 * TOLERANCE[dtype]), strict=True))
        rows.append([mode, "ragged" if ragged else "alike", str(dtype).removeprefix("torch."), *differences, TOLERANCE[dtype], ok])
    title = "Attention as the device computes it against the boolean mask in float64: root mean square differences, relative"
    print_table(title, ["questions", "cells", "type", "outputs", "gradients", "allowed (gradients: twice)", "met"], rows)
    return all(row[-1] for row in rows)


def _differences(n: int, shape: Shape, dtype: torch.dtype, layout: Layout) -> tuple[float, float]:
    device = torch.device("cpu") if layout.keys is None else layout.keys.order.device
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, shape.n_heads, shape.width // shape.n_heads, generator=generator).to(device, dtype) for _ in range(3)]
    upstream = torch.randn(inputs[0].shape, generator=generator).to(device)
    results = []
    for kind, backend in ((torch.float64, "reference"), (dtype, None)):
        own = [x.to(kind).requires_grad_() for x in inputs]
        out = attend(*own, layout, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, own, upstream.to(kind))])
    expected, found = results
    relative = [float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in zip(found, expected, strict=True)]
    return relative[0], max(relative[1:])


def _asked(tokens: TokenBatch, step: int) -> TokenBatch:
    return ask(tokens, [0.5], seed=0, step=step)


def _hidden(tokens: TokenBatch, step: int) -> TokenBatch:
    return hide_values(tokens, 0.5, seed=0, step=step)


QUESTIONS: dict[str, Callable[[TokenBatch, int], TokenBatch]] = {"half asked": _asked, "all visible": _hidden}


def seconds_per(work: Callable[[int], object], device: torch.device, n: int, warm_up: int) -> float:
    """Median over `n` calls, each waited for."""
    seconds = []
    for i in range(warm_up + n):
        began = time.perf_counter()
        work(i)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[warm_up:])


def trainer(model: af.ScGPT, device: torch.device) -> Callable[[TokenBatch], None]:
    """Build the optimizer; the result makes one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: TokenBatch) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            total = torch.stack([loss.mean for loss in model.losses(batch.to(device)).values()]).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_rows(device: torch.device, shape: Shape, options: argparse.Namespace) -> list[list[object]]:
    """Cells/s, tokens/s, MFU of whole training steps."""
    rows = []
    for cell_prompt, n_genes, mode in [(p, n, m) for p in (False, True) for n in shape.genes for m in QUESTIONS]:
        model = network(shape, cell_prompt).to(device).train()
        if options.compile:
            for layer in model.encoder.layers:
                layer.compile(dynamic=True)
        plain = [cells(shape, options.cells or shape.n_cells, n_genes, seed) for seed in range(4)]
        batches = [_pinned(QUESTIONS[mode](tokens, step), device) for step, tokens in enumerate(plain)]
        step = trainer(model, device)
        _reset_memory(device)
        seconds = seconds_per(lambda i, step=step, batches=batches: step(batches[i % 4]), device, options.rounds, options.warm_up)
        name = "training, two passes" if cell_prompt else "training"
        rows.append([name, n_genes, mode, *_rates(batches[0], seconds, batch_flops(model, batches[0]), device)])
    return rows


def embedding_rows(device: torch.device, shape: Shape, options: argparse.Namespace) -> list[list[object]]:
    """Cells/s, tokens/s, MFU of cell embeddings."""
    rows, model = [], network(shape, cell_prompt=False).to(device).eval()
    for n_genes in shape.genes:
        batches = [_pinned(cells(shape, options.cells or shape.n_embedded, n_genes, seed), device) for seed in range(4)]

        @torch.inference_mode()
        def embed(i: int, batches: Sequence[TokenBatch] = batches) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return model.encode(batches[i % 4].to(device), "cell").cell.float().cpu()

        _reset_memory(device)
        seconds = seconds_per(embed, device, options.rounds, options.warm_up)
        lengths = batches[0].offsets.diff().numpy()
        work = step_flops(model.config.model, lengths, lengths, np.zeros_like(lengths), [], training=False)
        rows.append(["embedding", n_genes, "all visible", *_rates(batches[0], seconds, work, device)])
    return rows


def _rates(batch: TokenBatch, seconds: float, work: int, device: torch.device) -> list[object]:
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else ""
    mfu = work / seconds / peak_flops(device, "bf16")
    return [batch.n_cells, 1e3 * seconds, batch.n_cells / seconds, batch.n_tokens / seconds, work / seconds / 1e12, mfu, memory]


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _pinned(tokens: TokenBatch, device: torch.device) -> TokenBatch:
    if device.type != "cuda":
        return tokens
    return TokenBatch(*(value.pin_memory() if isinstance(value, Tensor) else value for value in tokens))


def describe(device: torch.device) -> str:
    """Kind of device and versions, for the head of the tables."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, peak {peak_flops(device, 'bf16') / 1e12:,.4g} TFLOP/s (bf16)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a network of 2 layers and cells of 60 genes")
    parser.add_argument("--check", action="store_true", help="stop after looking for the device")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--cells", type=int, help="cells of a step; by default 96 in training, 256 in embedding")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=5)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py needs a CUDA device and a torch that was built for it: none was found (--device cpu --tiny runs without)",
            file=sys.stderr,
        )
        sys.exit(2)
    if options.check:
        return
    shape = TINY if options.tiny else PAPER
    print(describe(device))
    if not equality_table(device, shape):
        sys.exit("the attention of this device is not the one that the network is defined by: no speed is printed")
    rows = training_rows(device, shape, options) + embedding_rows(device, shape, options)
    columns = ["work", "genes", "questions", "cells", "ms", "cells/s", "tokens/s", "TFLOP/s", "MFU", "GiB"]
    print_table(f"Whole steps in bf16; published: {PUBLISHED} cells/s of 1,024 genes on one H100; aim on an H200: {AIM:,}", columns, rows)


if __name__ == "__main__":
    main()
