"""CellEncoder: the whole forward pass of the network, from packed tokens to states."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from annformer.model.attention import Layout, attend
from annformer.model.config import ModelConfig
from annformer.model.dropout import Dropout
from annformer.model.profile import ExpressionProfile
from annformer.model.ranks import sum_over_ranks
from annformer.model.view import ExpressionView
from annformer.tokens import Encoded, TokenBatch

Wanted = Literal["all", "cell", "targets"]
"""Which states the last layer computes: all tokens, `<cls>` only, or `<cls>` and the tokens that have a target."""

EPS_INPUT_NORM = 6.1e-5  # of the original's bn and dsbn (REFERENCE: model.py)
MAX_VALUE = 512.0  # the original clamps values from above before embedding them
TABLE_FROM, TABLE_TO = -2, 64  # whole values in this range are embedded once and looked up


class CellEncoder(nn.Module):
    """Transformer over the gene tokens of cells (scGPT: Cui et al. 2024, Methods "scGPT model architecture").

    A token is the sum of its gene's embedding and its value's embedding; there is no position. Asked tokens carry a learned vector in place
    of a value. Batch and modality embeddings stand beside the states for the heads and never enter the transformer.

    Parameters
    ----------
    config
        Sizes and switches.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.gene = nn.Embedding(config.vocab_size, width)
        self.gene_norm = nn.LayerNorm(width)
        self.value = ValueEncoder(width)
        self.value_dropout = Dropout(config.dropout)
        self.asked = nn.Parameter(torch.randn(width)) if config.generative else None
        self.flag = nn.Embedding(config.n_flags, width) if config.n_flags else None
        self.dose = nn.Linear(1, width, bias=False) if config.dose else None
        self.batch = nn.Embedding(config.n_batches, width) if config.batch_context else None
        self.batch_norm = nn.LayerNorm(width) if config.batch_context else None
        self.modality = nn.Embedding(config.n_modalities, width) if config.n_modalities else None
        self.modality_norm = nn.LayerNorm(width) if config.n_modalities else None
        self.input_norm: nn.Module | None = None
        if config.input_norm == "batch":
            self.input_norm = nn.BatchNorm1d(width, eps=EPS_INPUT_NORM)
        elif config.input_norm == "domain":
            self.input_norm = DomainNorm(width, config.n_batches)
        self.view = ExpressionView(config.view, width) if config.view else None
        self.profile = ExpressionProfile(config.vocab_size, width) if config.profile else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        nn.init.uniform_(self.gene.weight, -0.1, 0.1)

    def forward(self, tokens: TokenBatch, wanted: Wanted = "all") -> Encoded:
        """Encode cells.

        Parameters
        ----------
        tokens
            A packed batch.
        wanted
            What the last layer is asked for; less is faster.

        Raises
        ------
        ValueError
            When the batch holds something this network has no tensors for (flags, dose, modality, asked tokens), or lacks
            `labels["batch"]`.
        """
        self._refuse_what_is_not_there(tokens)
        every, last = self._layouts(tokens, wanted)
        genes = self.gene_norm(self.gene(tokens.gene_ids))
        x = self._embed(genes, tokens, every.asked_rows)
        for layer in self.layers[:-1]:
            x = layer(x, every)
        states, rows = self.layers[-1](x, last), last.rows
        cls = tokens.offsets[:-1]
        cell = states if wanted == "cell" else states[cls if rows is None else torch.searchsorted(rows, cls)]
        if self.profile is not None:
            assert tokens.profile is not None, "refused above"
            cell = cell + self.profile(tokens.profile)
        if self.view is not None:
            assert tokens.expression is not None, "refused above"
            cell = cell + self.view(tokens.expression)
        return Encoded(states=states, rows=rows, genes=genes, cell=cell, context=self._context(tokens))

    def gene_embedding(self, gene_ids: Int[Tensor, "gene"]) -> Float[Tensor, "gene width"]:
        """Embeddings of genes without value and context (scGPT: the input of gene network inference)."""
        return self.gene_norm(self.gene(gene_ids))

    def _embed(
        self, genes: Float[Tensor, "token width"], tokens: TokenBatch, asked: Bool[Tensor, "token"] | None
    ) -> Float[Tensor, "token width"]:
        values = self.value_dropout(self.value(tokens.values))
        if asked is not None and self.asked is not None:
            values = torch.where(asked[:, None], self.asked, values)
        x = genes + values
        if self.flag is not None:
            x = x + (self.flag.weight[0] if tokens.flags is None else self.flag(tokens.flags))
        if self.dose is not None and tokens.dose is not None:
            x = x + self.dose(tokens.dose[:, None])
        if isinstance(self.input_norm, DomainNorm):
            x = self.input_norm(x, tokens.labels["batch"][tokens.cell_of_token()])
        elif self.input_norm is not None:
            x = self.input_norm(x)
        if tokens.cell is not None:  # after the norm, as the original does
            x = x.index_copy(0, tokens.offsets[:-1], tokens.cell.to(x.dtype))
        return x

    def _context(self, tokens: TokenBatch) -> Float[Tensor, "token width"] | None:
        context = None
        if self.batch is not None and self.batch_norm is not None:
            context = self.batch_norm(self.batch(tokens.labels["batch"]))[tokens.cell_of_token()]
        if self.modality is not None and self.modality_norm is not None:
            modality = self.modality_norm(self.modality(tokens.modality))
            context = modality if context is None else context + modality
        return context

    @staticmethod
    def _layouts(tokens: TokenBatch, wanted: Wanted) -> tuple[Layout, Layout]:
        """Who asks in all layers but the last, and in the last."""
        if wanted == "all":
            every = Layout.of(tokens)
            return every, every
        if wanted == "cell":
            return Layout.of_cells(tokens)
        if tokens.targets is None:
            msg = "wanted='targets' needs a batch with targets: use masking.ask or masking.hide_values"
            raise ValueError(msg)
        return Layout.of_marked(tokens, torch.isfinite(tokens.targets).index_fill(0, tokens.offsets[:-1], True))  # noqa: FBT003

    def _refuse_what_is_not_there(self, tokens: TokenBatch) -> None:
        config = self.config
        found = [
            name
            for name, given, known in (
                ("flags", tokens.flags is not None, config.n_flags > 0),
                ("dose", tokens.dose is not None, config.dose),
                ("modality", tokens.modality is not None, config.n_modalities > 0),
                ("expression", tokens.expression is not None, config.view > 0),
                ("profile", tokens.profile is not None, config.profile),
            )
            if given and not known
        ]
        if found:
            msg = f"the batch carries {', '.join(found)}, but this model has no tensors for it: see ModelConfig"
            raise ValueError(msg)
        if (config.batch_context or config.input_norm == "domain") and "batch" not in tokens.labels:
            msg = f"this model needs labels['batch']; the batch carries {sorted(tokens.labels)}: give the source a batch_key"
            raise ValueError(msg)
        if config.view and tokens.expression is None:
            msg = f"this model needs the expression of the {config.view} genes of its panel: tokenize(..., view=True)"
            raise ValueError(msg)
        if config.profile and tokens.profile is None:
            msg = "this model needs the profile of every cell: tokenize(..., profile=True)"
            raise ValueError(msg)
        if config.n_modalities and tokens.modality is None:
            msg = "this model needs the modality of every token"
            raise ValueError(msg)
        if not config.generative and bool((tokens.n_visible < tokens.offsets.diff()).any()):
            msg = "the batch asks for genes, but this model was not made to be asked: set generative=True in ModelConfig"
            raise ValueError(msg)


class ValueEncoder(nn.Module):
    """A value's embedding: two linear layers and a LayerNorm (scGPT `ContinuousValueEncoder`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values: Float[Tensor, "token"]) -> Float[Tensor, "token width"]:
        """Embed values; whole numbers from a small range (bins, -1, -2) are embedded once each and looked up."""
        index = values.long()
        # asking costs a synchronisation on a GPU, where the two products are cheap anyway
        if values.device.type == "cpu" and values.numel() > TABLE_TO - TABLE_FROM and self._is_whole(values, index):
            table = self._embed(torch.arange(TABLE_FROM, TABLE_TO, dtype=values.dtype))
            return F.embedding(index - TABLE_FROM, table)
        return self._embed(values)

    @staticmethod
    def _is_whole(values: Tensor, index: Tensor) -> bool:
        return bool(((index == values) & (index >= TABLE_FROM) & (index < TABLE_TO)).all())

    def _embed(self, values: Float[Tensor, "value"]) -> Float[Tensor, "value width"]:
        x = values.clamp(max=MAX_VALUE)[:, None].to(self.hidden.weight.dtype)
        return self.norm(self.out(F.relu(self.hidden(x))))


class DomainNorm(nn.Module):
    """Batch normalisation of tokens with the statistics of their own experimental batch, in mixed batches (DSBN without affine part).

    Equal to one `BatchNorm1d(affine=False)` per domain; statistics in float32 at least, in training over the tokens of all ranks. A domain
    with a single token in training is normalised by its running statistics and does not update them. The original takes the first cell's
    domain for the whole batch.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, n_domains: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))
        self.register_buffer("num_batches_tracked", torch.zeros(n_domains, dtype=torch.long))

    def forward(self, x: Float[Tensor, "token width"], domain: Int[Tensor, "token"]) -> Float[Tensor, "token width"]:
        """Normalise each token within its domain."""
        wide = x if x.dtype == torch.float64 else x.float()
        mean, var = self._statistics(wide, domain) if self.training else (self.running_mean, self.running_var)
        return ((wide - mean[domain]) * (var[domain] + EPS_INPUT_NORM).rsqrt()).to(x.dtype)

    def _statistics(self, x: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        count = sum_over_ranks(torch.bincount(domain, minlength=len(self.running_mean)))
        n = count.clamp(min=1)[:, None].to(x.dtype)
        zero = torch.zeros_like(self.running_mean, dtype=x.dtype)
        mean = sum_over_ranks(zero.index_add(0, domain, x)) / n
        centred = x - mean[domain]
        var = sum_over_ranks(zero.index_add(0, domain, centred * centred)) / n
        enough = (count > 1)[:, None]
        with torch.no_grad():
            unbiased = var * n / (n - 1).clamp(min=1)
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.copy_(torch.where(enough, torch.lerp(running.to(new.dtype), new, self.momentum), running))
            self.num_batches_tracked += enough[:, 0]
        return torch.where(enough, mean, self.running_mean), torch.where(enough, var, self.running_var)


class Layer(nn.Module):
    """Post-norm transformer layer on a packed batch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.n_heads = config.n_heads
        self.attention_dropout = config.attention_dropout
        self.project_asked = config.project_asked
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.ff_in = nn.Linear(width, config.ff_width)
        self.ff_out = nn.Linear(config.ff_width, width)
        self.ff_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "token width"], layout: Layout) -> Float[Tensor, "row width"]:
        """New states of the tokens that `layout` lets query."""
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in self._project(x, layout))
        context = attend(q, k, v, layout, dropout=self.attention_dropout if self.training else 0.0).flatten(1)
        mixed = self.attention_out(context)
        if not self.project_asked and layout.asked_rows is not None:
            mixed = torch.where(layout.asked_rows[:, None], context, mixed)
        return self.by_token(x if layout.rows is None else x[layout.rows], mixed)

    def by_token(self, x: Float[Tensor, "row width"], mixed: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """Add to states what attention found, and send them through the feed-forward block: all that looks at one token at a time."""
        x = self.attention_norm(x + self.dropout(mixed))
        hidden = self.dropout(F.relu(self.ff_in(x), inplace=True))
        return self.ff_norm(x + self.dropout(self.ff_out(hidden)))

    def _project(self, x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        if layout.rows is None:
            return self.qkv(x).chunk(3, -1)
        width = x.shape[-1]
        q = F.linear(x[layout.rows], self.qkv.weight[:width], self.qkv.bias[:width])
        return q, *F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)
