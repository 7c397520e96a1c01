"""The command line: a static table of commands, each the typed function `command` in a module of its own.

Help and misspelt commands are answered from the table, before anything heavy is imported.
"""

from __future__ import annotations

import sys

COMMANDS = {
    "demo": "the main job on real cells that ship with a dependency: embed, annotate, one HTML page",
    "inspect": "what a file or a model is, whether it will work, what is odd about it",
    "embed": "cells in, the same cells with their embeddings out",
    "integrate": "cells of several batches into one embedding, fine-tuned on them",
    "compare": "a task by annformer and by the simple methods: scores, verdicts, one HTML page",
    "prepare": "data sets into one shuffled store for pretraining",
    "pretrain": "a store into a model, trained from scratch; goes on where it was stopped",
    "convert": "the authors' checkpoint folder into ours, or back",
    "version": "the versions of annformer and of what it stands on",
}

HELP = """\
usage: annformer COMMAND [OPTIONS]

A single-cell foundation model for AnnData files.

commands:
{commands}

with every command:
  --help            its words and options
  --config FILE     options from a YAML file; what is typed wins
  --quiet           only warnings and errors
  --debug           more log lines, and the traceback of an error

Exit status: 0 done, 2 something in your input or words is wrong, 1 our fault.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    argv
        The words after `annformer`; None: those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<17} {caption}" for name, caption in COMMANDS.items())), end="")
        return 0
    if words[0] in ("--version", "version"):
        return _version()
    if words[0] not in COMMANDS:
        return _unknown(words[0])

    from annformer.cli._run import run  # heavy: only once there is something to do

    return run(words[0], words[1:])


def _unknown(word: str) -> int:
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=2)
    meant = f"did you mean {' or '.join(near)}?" if near else "`annformer --help` says what each one does."
    print(
        f"annformer: error: there is no command {word!r}.\n  expected: one of {', '.join(COMMANDS)}.\n  what to do: {meant}",
        file=sys.stderr,
    )
    return 2


def _version() -> int:
    import platform
    from importlib.metadata import version

    print(f"annformer {version('annformer')}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "numpy", "scipy", "anndata", "scanpy", "lightning", "numba", "h5py", "zarr"):
        print(f"{name} {version(name)}")
    return 0
