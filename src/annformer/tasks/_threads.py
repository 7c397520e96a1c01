"""How many threads torch uses inside a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from annformer.errors import input_error


@contextmanager
def torch_threads(n: int | None) -> Iterator[None]:
    """Let torch use `n` threads inside."""
    if n is not None and n < 1:
        found = f"threads is {n}"
        raise input_error(found, "1 or more", "leave it out for as many as there are cores")
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
