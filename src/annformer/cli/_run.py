"""One run of one command: words to arguments, a log, an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from annformer.cli._messages import explain, our_fault
from annformer.cli._words import arguments
from annformer.errors import AnnformerWarning

log = logging.getLogger("annformer")

SOON = 0.05
"""Seconds after which a Ctrl-C that was dropped is said again."""


def run(name: str, words: list[str]) -> int:
    """Call the command `name`, such as "embed" or "map fit", with `words`; every way in which that can end is an exit status.

    0: done. 2: something in the user's input or words is wrong, or the user stopped it. 1: our fault.
    """
    debug, quiet = "--debug" in words, "--quiet" in words
    words = [word for word in words if word not in ("--debug", "--quiet")]
    with _logging(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO), _warnings(others=debug), _ctrl_c_heard():
        try:
            module, _, inner = name.partition(" ")
            command: Callable[..., int | None] = getattr(import_module(f"annformer.cli.{module}"), inner or "command")
            values = arguments(name, command, words)
            return 0 if values is None else command(**values) or 0
        except BrokenPipeError:  # `annformer inspect FILE | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one place where everything ends
            return _end(name, error, debug=debug)


def _end(name: str, error: BaseException, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = explain(error)
    print(f"annformer {name}: error: {message or our_fault(error)}", file=sys.stderr)
    return 1 if message is None else 2


def progress_wanted() -> bool | None:
    """What commands tell the library of progress bars: none after --quiet, else where stderr is a terminal."""
    return None if log.isEnabledFor(logging.INFO) else False


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Log lines of annformer on stderr for as long as the command runs: in colour on a terminal, plain elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@contextmanager
def _ctrl_c_heard() -> Iterator[None]:
    """Say Ctrl-C once more where Python dropped it: what is raised while an object is taken apart is printed and forgotten."""
    before, timers = sys.unraisablehook, []

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            timers.append(threading.Timer(SOON, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)))
            timers[-1].start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()  # what was to be stopped has ended by itself


@contextmanager
def _warnings(*, others: bool) -> Iterator[None]:
    """Show annformer's warnings as log lines; those of the packages below it only on request."""

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        log.warning("%s", message if issubclass(category, AnnformerWarning) else f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default" if others else "ignore")
        warnings.simplefilter("always", AnnformerWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
