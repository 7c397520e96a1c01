"""The embedding that annotation's methods share: made once for all folds, and kept with the finished runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from anndata import AnnData
from jaxtyping import Float32

from annformer.comparison.kept import Arrays, Kept
from annformer.comparison.methods import watched
from annformer.scgpt import ScGPT

log = logging.getLogger(__name__)

EMBEDDING: Final = "X_annformer"
"""Place in obsm."""


@dataclass(frozen=True)
class Embedded:
    """What `embed` writes."""

    rows: Float32[np.ndarray, "cell width"]
    record: Mapping[str, Any]

    def arrays(self) -> Arrays:
        """All of it, to be kept."""
        return {"rows": self.rows, "record": np.array(json.dumps(self.record, default=lambda value: value.item()))}

    @classmethod
    def of_arrays(cls, arrays: Arrays) -> Self:
        """Take what `arrays` gave."""
        return cls(arrays["rows"], json.loads(str(arrays["record"])))


def embed_once(cells: AnnData, model: ScGPT, options: Mapping[str, Any], kept: Kept) -> float:
    """Embed all cells, a pure function of the content of each, without any type; return the seconds that it took."""
    from annformer.tasks._threads import torch_threads
    from annformer.tasks.embedding import embed

    def made() -> Embedded:
        with torch_threads(options.get("threads")):
            embed(cells, model, key_added=EMBEDDING, layer="X", progress=False, device=options.get("device"))
        return Embedded(np.asarray(cells.obsm[EMBEDDING]), cells.uns["annformer"][EMBEDDING])

    log.info("embedding %s cells once for all folds", f"{cells.n_obs:,}")
    embedded, seconds, _ = kept.get(Embedded, lambda: watched(made), method="embedding")
    cells.obsm[EMBEDDING], cells.uns["annformer"] = embedded.rows, {EMBEDDING: dict(embedded.record)}
    return seconds
