"""How long work takes that goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from annformer.errors import InputError

SECONDS: Final = ".seconds"
"""File in the folder of such work: what it has taken so far."""


@contextmanager
def timed(folder: Path | None) -> Iterator[Callable[[], float]]:
    """Yield what tells the seconds of the work, those of earlier starts in the same folder among them.

    Parameters
    ----------
    folder
        Keeps them, unless it is gone when the work ends, or the input was refused; a start that ends by `kill -9` is not counted. None:
        there were none.
    """
    before, began = _before(folder), time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - began

    worked = True
    try:
        yield seconds
    except InputError:  # what lies in the folder may be the work of another
        worked = False
        raise
    finally:
        if worked and folder is not None and folder.is_dir():
            with suppress(OSError):  # a clock is no reason to lose the work
                (folder / SECONDS).write_text(str(seconds()))


def _before(folder: Path | None) -> float:
    try:
        return 0.0 if folder is None else float((folder / SECONDS).read_text())
    except (OSError, ValueError):
        return 0.0
