"""Packages that some baselines need and not every installation has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from annformer.errors import input_error

PACKAGES = {
    "Harmony": ("harmonypy", "annformer[harmony]"),
    "scVI": ("scvi", "annformer[baselines]"),
    "CellTypist": ("celltypist", "annformer[baselines]"),
}
"""First word of a baseline's name -> module that it needs, and what to install."""


def available(name: str) -> str | None:
    """What to install before this baseline can run; None when nothing is missing."""
    package = name.split()[0]
    module, distribution = PACKAGES.get(package, ("", ""))
    return f"pip install '{distribution}'" if module and find_spec(module) is None else None


def require(package: str) -> None:
    """Say what to install where the package is missing."""
    install = available(package)
    if install is not None:
        found = f"the package of the baseline {package} is not installed"
        raise input_error(found, f"the package {PACKAGES[package][0]}", install)


@contextmanager
def quietly(*names: str) -> Iterator[None]:
    """What these packages log at level INFO is of their inner life."""
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.WARNING)
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
