"""A single-cell foundation model: pretrain, embed, annotate and integrate cells from AnnData files.

The public names are loaded when they are first used, so that `import annformer` costs nothing: no torch, no AnnData.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from annformer.data.anndata import AnnDataSource as AnnDataSource
    from annformer.errors import AnnformerWarning as AnnformerWarning
    from annformer.errors import InputError as InputError
    from annformer.model.config import ModelConfig as ModelConfig
    from annformer.scgpt import ScGPT as ScGPT
    from annformer.tasks.annotation import CellTypeClassifier as CellTypeClassifier
    from annformer.tasks.embedding import embed as embed
    from annformer.tasks.embedding import embed_file as embed_file
    from annformer.tasks.inspection import inspect as inspect
    from annformer.tasks.integration import BatchIntegrator as BatchIntegrator
    from annformer.tasks.mapping import ReferenceMapper as ReferenceMapper
    from annformer.tokenizer import TokenizerSettings as TokenizerSettings
    from annformer.vocab import GeneVocab as GeneVocab

    __version__: str

_HOME = {
    "AnnDataSource": "annformer.data.anndata",
    "AnnformerWarning": "annformer.errors",
    "BatchIntegrator": "annformer.tasks.integration",
    "CellTypeClassifier": "annformer.tasks.annotation",
    "GeneVocab": "annformer.vocab",
    "InputError": "annformer.errors",
    "ModelConfig": "annformer.model.config",
    "ReferenceMapper": "annformer.tasks.mapping",
    "ScGPT": "annformer.scgpt",
    "TokenizerSettings": "annformer.tokenizer",
    "embed": "annformer.tasks.embedding",
    "embed_file": "annformer.tasks.embedding",
    "inspect": "annformer.tasks.inspection",
}
"""Where each public name lives."""


def __getattr__(name: str) -> Any:
    """Load a public name on first use and keep it."""
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("annformer")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOME, "__version__", "__doc__", "__name__", "__file__", "__path__"})
