"""Timing for every benchmark: ways alternate A B C A B C in one process, medians are compared, a table is printed.

Other work on the machine slows all ways alike when they alternate in short blocks, so ratios hold where absolute numbers do not.
CPU seconds (all threads together) are kept beside wall seconds for the same reason.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """What one way took, a number per round."""

    wall: list[float]
    cpu: list[float]

    @property
    def seconds(self) -> float:
        """Median of the wall seconds."""
        return median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """Median of the CPU seconds of all threads."""
        return median(self.cpu)

    @property
    def spread(self) -> float:
        """Largest over smallest wall time: how quiet the machine was."""
        return max(self.wall) / min(self.wall)


def alternate(ways: Mapping[str, Callable[[int], object]], n: int = 5, warm_up: int = 1) -> dict[str, Timing]:
    """Run every way once per round, `n` rounds after `warm_up` unmeasured ones.

    Parameters
    ----------
    ways
        Each gets the number of the round (0 while warming up), so that all ways meet the same fresh cells in a round.
    """
    timings = {name: Timing([], []) for name in ways}
    for way in ways.values():
        for _ in range(warm_up):
            way(0)
    for round_ in range(n):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way(round_)
            timings[name].cpu.append(time.process_time() - cpu)
            timings[name].wall.append(time.perf_counter() - wall)
    return timings


def ratio(slow: Timing, fast: Timing) -> float:
    """Median over the rounds of slow / fast wall seconds, each round against itself."""
    return median(a / b for a, b in zip(slow.wall, fast.wall, strict=True))


def cpu_ratio(slow: Timing, fast: Timing) -> float:
    """Median over the rounds of slow / fast CPU seconds; other work on the machine hardly touches it."""
    return median(a / b for a, b in zip(slow.cpu, fast.cpu, strict=True))


def matmul_peak(rounds: int = 7) -> float:
    """Largest GFLOP/s of a 1024 x 1024 float32 matrix product in this run, with as many threads as torch has now."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    timings = alternate({"mm": lambda _: [torch.mm(a, b) for _ in range(4)]}, n=rounds, warm_up=2)["mm"]
    return 4 * 2 * 1024**3 / min(timings.wall) / 1e9


def machine() -> str:
    """Kind of machine, for the foot of a table; no names."""
    simd = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} with {simd}, torch {torch.__version__.partition('+')[0]} CPU"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table that can be pasted into README.md; floats get three significant digits."""
    texts = [list(columns), *[[_text(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    print(f"\n{title}\n")
    for number, row in enumerate(texts):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _text(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)
