"""The command line: a static table of commands, each the typed function `command` in a module of its own.

A command with subcommands has a table of them in `SUBCOMMANDS`; each is the typed function of its name in the command's module. Help and
misspelt commands are answered from the tables, before anything heavy is imported.
"""

from __future__ import annotations

import sys

COMMANDS = {
    "demo": "the main job on real cells that ship with a dependency: embed, annotate, one HTML page",
    "inspect": "what a file or a model is, whether it will work, what is odd about it",
    "embed": "cells in, the same cells with their embeddings out",
    "integrate": "cells of several batches into one embedding, fine-tuned on them",
    "annotate": "cell types learned from a labelled reference, and called with calibrated confidence",
    "map": "cells named after their nearest neighbours in a labelled reference",
    "compare": "a task by annformer and by the simple methods: scores, verdicts, one HTML page",
    "prepare": "data sets into one shuffled store for pretraining",
    "pretrain": "a store into a model, trained from scratch; goes on where it was stopped",
    "convert": "the authors' checkpoint folder into ours, or back",
    "version": "the versions of annformer and of what it stands on",
}

SUBCOMMANDS = {
    "annotate": {
        "fit": "a labelled reference into a classifier",
        "predict": "cells in, the same cells with their types out",
    },
    "map": {
        "fit": "a labelled reference into an index of embedded cells",
        "add": "the cells of another study into an index",
        "predict": "cells in, the same cells with the labels of their neighbours out",
    },
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


GROUP_HELP = """\
usage: annformer {name} COMMAND [OPTIONS]

{caption}

commands:
{commands}

`annformer {name} COMMAND --help` says what each one does.
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
        print(HELP.format(commands=_listed(COMMANDS)), end="")
        return 0
    if words[0] in ("--version", "version"):
        return _version()
    if words[0] not in COMMANDS:
        return _unknown("annformer", words[0], COMMANDS)
    if words[0] in SUBCOMMANDS:
        return _group(words[0], words[1:])

    from annformer.cli._run import run  # heavy: only once there is something to do

    return run(words[0], words[1:])


def _group(name: str, words: list[str]) -> int:
    """Run a subcommand."""
    inner = SUBCOMMANDS[name]
    if not words or words[0] in ("--help", "-h", "help"):
        print(GROUP_HELP.format(name=name, caption=COMMANDS[name].capitalize() + ".", commands=_listed(inner)), end="")
        return 0
    if words[0] not in inner:
        return _unknown(f"annformer {name}", words[0], inner)

    from annformer.cli._run import run

    return run(f"{name} {words[0]}", words[1:])


def _listed(commands: dict[str, str]) -> str:
    return "\n".join(f"  {name:<17} {caption}" for name, caption in commands.items())


def _unknown(before: str, word: str, known: dict[str, str]) -> int:
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=2)
    meant = f"did you mean {' or '.join(near)}?" if near else f"`{before} --help` says what each one does."
    print(
        f"{before}: error: there is no command {word!r}.\n  expected: one of {', '.join(known)}.\n  what to do: {meant}",
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
