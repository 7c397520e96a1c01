"""Time to the first answer: `import annformer`, `annformer --help`, a vocabulary of the published size.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from _timing import Timing, alternate, machine, print_table

N_TOKENS = 60_697  # of the published whole-human vocabulary


def commands() -> dict[str, list[str]]:
    python = [sys.executable, "-c"]
    script = Path(sys.executable).with_name("annformer")
    return {
        "python, nothing": [*python, "pass"],
        "import annformer": [*python, "import annformer"],
        "annformer --help": [str(script), "--help"],
    }


def measure_commands(rounds: int) -> dict[str, Timing]:
    def run(command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True)

    return alternate({name: lambda _, command=command: run(command) for name, command in commands().items()}, n=rounds)


def measure_vocabulary(rounds: int, n_tokens: int) -> Timing:
    from annformer.vocab import GeneVocab

    order = np.random.default_rng(0).permutation(n_tokens).tolist()  # file order is arbitrary in published files
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({f"GENE{i}" if i < n_tokens - 3 else f"<special{i}>": i for i in order}))
        return alternate({"vocabulary": lambda _: GeneVocab.from_json(path)}, n=rounds)["vocabulary"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--n_tokens", type=int, default=N_TOKENS)
    options = parser.parse_args(arguments)
    took = measure_commands(options.rounds)
    took[f"GeneVocab.from_json, {options.n_tokens:,} tokens"] = measure_vocabulary(options.rounds, options.n_tokens)
    bars = (None, 0.3, 0.1, 0.2)
    rows = [
        [name, timing.seconds, min(timing.wall), "" if bar is None else f"< {bar} s", "" if bar is None else timing.seconds < bar]
        for (name, timing), bar in zip(took.items(), bars, strict=True)
    ]
    print_table(f"Seconds, interpreter included. {machine()}.", ["what", "median", "best", "bar", "met"], rows)


if __name__ == "__main__":
    main()
