"""How processes that train together speak with each other, beside their gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only

from annformer.model.ranks import n_ranks

_T = TypeVar("_T")


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def is_first_on_node() -> bool:
    """Whether this process does what is needed once per machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


class SaidElsewhere(SystemExit):
    """Ends a process where all ranks stop for the same reason, and the first one says it."""


def stop_all(reason: BaseException) -> BaseException:
    """Build what every rank raises, where all know the same reason to stop."""
    return reason if n_ranks() == 1 or torch.distributed.get_rank() == 0 else SaidElsewhere(0)


def on_first_rank(make: Callable[[], _T]) -> _T:
    """Let the first rank make something and give it to all; all stop where it cannot."""
    if n_ranks() == 1:
        return make()
    box: list[Any] = [None, False]
    error: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as met:  # noqa: BLE001  # whatever it is, the others wait for this rank
            error, box[1] = met, True
    torch.distributed.broadcast_object_list(box, 0)
    if box[1]:
        raise error or SaidElsewhere(0)
    return box[0]


def of_all_ranks(value: _T) -> list[_T]:
    """Collect the values of all ranks, in their order."""
    values = [value] * n_ranks()
    if n_ranks() > 1:
        torch.distributed.all_gather_object(values, value)
    return values
