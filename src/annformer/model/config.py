"""The sizes and switches of the network."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from annformer.config import Config


class ModelConfig(Config):
    """Everything that decides which tensors a `CellEncoder` has and how they are used.

    The scGPT family as published: continuous values, `<cls>` pooling, post-norm layers, ReLU.
    """

    vocab_size: int = Field(gt=0)
    """Rows of the gene table: every token of the vocabulary, special tokens included."""
    width: int = Field(128, gt=0)
    """Length of a token's state and of the cell embedding (`embsize`)."""
    n_heads: int = Field(4, gt=0)
    n_layers: int = Field(6, gt=0)
    ff_width: int = Field(128, gt=0)
    """Width inside the feed-forward block (`d_hid`); the published models do not widen it."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """On value embeddings, residuals and inside the feed-forward block."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """On attention probabilities. Off by default: on CPU it forces the tokens x tokens path; the original uses `dropout` here too."""
    input_norm: Literal["none", "batch", "domain"] = "none"
    """Normalisation of the token embeddings: one BatchNorm (`bn`) or one per experimental batch without affine part (DSBN)."""
    n_batches: int = Field(0, ge=0)
    """Number of experimental batches that `labels["batch"]` counts through."""
    batch_context: bool = False
    """Append an embedding of the experimental batch to what the heads read; it never enters the transformer."""
    n_modalities: int = Field(0, ge=0)
    """Number of modalities (RNA, protein, `<cls>`, ...) whose embedding the heads read beside the states."""
    n_flags: int = Field(0, ge=0)
    """Rows of the table of per-token conditions, 0 = none; 0 rows: no such table."""
    view: int = Field(0, ge=0)
    """Genes whose log-normalised expression the cell embedding reads beside the tokens (`ExpressionView`); 0: no such view."""
    profile: bool = False
    """The cell embedding also holds a linear reading of all expressed genes (`ExpressionProfile`). Not in scGPT."""
    dose: bool = False
    """Add `dose` times a learned direction to a token."""
    generative: bool = True
    """The network may be asked for genes: it has a vector that stands in for the value of an asked token."""
    project_asked: bool = True
    """Send the attention context of asked tokens through the output projection. Off in converted weights: the published generative models
    were trained without it (scGPT dev-temp, `FlashscGPTMHA`)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.width % self.n_heads:
            msg = f"width {self.width} must be a multiple of n_heads {self.n_heads}"
            raise ValueError(msg)
        if (self.input_norm == "domain" or self.batch_context) and not self.n_batches:
            msg = "input_norm='domain' and batch_context need n_batches >= 1"
            raise ValueError(msg)
        return self

    @property
    def has_context(self) -> bool:
        """Whether heads read a context (batch and/or modality) beside the states."""
        return self.batch_context or self.n_modalities > 0

    @property
    def head_width(self) -> int:
        """Length of the vector an expression head reads: the state, and the context where there is one."""
        return self.width * (2 if self.has_context else 1)
