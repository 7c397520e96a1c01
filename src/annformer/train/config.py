"""Settings of a training run: what a recipe says."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from annformer.config import Config
from annformer.errors import input_error
from annformer.model.config import ModelConfig
from annformer.objectives import AnyObjectiveConfig, each_kind_once
from annformer.objectives.gep import GEPConfig
from annformer.objectives.gepc import GEPCConfig
from annformer.tokenizer import TokenizerSettings
from annformer.vocab import GeneVocab

Precision = Annotated[Literal["32", "bf16", "fp16"], BeforeValidator(lambda value: "32" if value == 32 else value)]
"""YAML reads 32 as a number."""


class HoldOut(Config):
    """Cells that are never trained on: a share of all, or whole groups of a label column, which tell more about new data."""

    share: float = Field(0.05, gt=0, lt=1)
    """Share of the cells, drawn by the seed; not read where `groups` are given."""
    column: str = "study"
    """Label column that `groups` are values of."""
    groups: tuple[str, ...] = ()
    n_cells: int = Field(512, gt=0)
    """Held-out cells that a validation looks at, drawn once, from every group alike."""


class Balance(Config):
    """How often the cells of each group are seen, where not simply as often as there are cells."""

    column: str = "study"
    power: float = Field(0.0, ge=0, le=1)
    """A group of n cells counts as n^(1 - power): 0 as the cells are, 1 all groups alike."""
    factors: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Further factors for groups by name; 0 leaves a group out."""


class TrainConfig(Config):
    """How long, how fast and on which cells the weights are fitted."""

    epochs: float = Field(20, gt=0)
    """Times that every training cell is seen; a part of an epoch is possible."""
    tokens_per_step: int = Field(8_192, gt=0)
    """Tokens of one update of the weights, over all devices together."""
    tokens_per_forward: int = Field(32_768, gt=0)
    """Tokens that one device takes at a time, which decides its memory; a step takes as many turns as it needs. Turns change nothing but
    dropout, which is drawn anew for each, and ecs, cce and input_norm, which see the cells of one turn, those of all devices together
    (input_norm "batch" cannot: it trains on one device only)."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens of a cell in a training step, where less than `tokenizer.max_length`, with which the model is validated and used: cost
    grows faster than length, and the genes are drawn anew in every step."""
    min_genes: int = Field(1, ge=1)
    """Cells with fewer expressed genes of the vocabulary are left out."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest rate: reached after the warm-up, left as `schedule` says."""
    schedule: Literal["cosine", "epochs"] = "cosine"
    """`cosine`: half a cosine down to `last_rate_share`; `epochs`: times `epoch_decay` after every epoch."""
    epoch_decay: float = Field(0.9, gt=0, le=1)
    """Of the schedule `epochs`."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    last_rate_share: float = Field(0.05, ge=0, le=1)
    """Rate of the last step as a share of the highest."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW, on matrices only."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this length."""
    asked_shares: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field((0.25, 0.5, 0.75), min_length=1)
    """Shares of a cell's genes that are asked; each step draws one of them."""
    mode: Literal["ask", "hide", "none"] = "ask"
    """`ask`: generative, asked genes are seen by nobody; `hide`: masked values, the genes stay visible without their value; `none`: every
    value is seen, for objectives that learn from labels alone."""
    hold_out: HoldOut = Field(default_factory=HoldOut)
    balance: Balance = Field(default_factory=Balance)
    gene_init: Literal["random", "svd"] = "random"
    """What the rows of the gene table start from: noise, or a singular value decomposition of the training cells."""
    precision: Precision = "32"
    compile: bool = False
    """Compile what looks at one token at a time (`torch.compile`, any number of tokens): residuals, normalisations, feed-forward blocks.
    Needs a C++ compiler, on GPUs Triton. On two CPU cores it gained nothing (benchmarks/README.md)."""
    validations: int = Field(20, ge=0)
    """How often the held-out cells are looked at, evenly over the run, beside once before it."""
    patience: int | None = Field(None, gt=0)
    """Validations without a better loss after which the run ends; the weights are then those of the best one. None: the run goes to its
    end, and the weights are the last ones. What an adversary loses (dar) does not count."""
    log_steps: int = Field(10, gt=0)
    """Steps from one row of the log to the next."""
    checkpoint_minutes: float = Field(10, gt=0)
    """Minutes from one checkpoint to the next: what a crash may cost."""
    checkpoint_steps: int | None = Field(None, gt=0)
    """Also write one every so many steps."""
    keep_checkpoints: int = Field(2, gt=0)
    workers: int = Field(0, ge=0)
    """Processes that read and tokenize; 0: the training process does."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides weights, splits, order, ties, questions and dropout."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.mode != "none" and not any(self.asked_shares):
            msg = f"mode={self.mode!r} with an asked share of 0 alone asks for nothing"
            raise ValueError(msg)
        return self


class Machine(Config):
    """Where a run takes place; changes nothing but its speed (and, between machines, the last digits)."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """GPUs, or processes on a CPU, per node; "auto": all GPUs, or one process."""
    nodes: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """`ddp` copies the model to every device, `fsdp` (FSDP2) spreads it; "auto": ddp where there is more than one device."""
    loggers: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ("csv",)


def _generative() -> dict[str, AnyObjectiveConfig]:
    return {"gep": GEPConfig.model_validate({"cell_prompt": True}), "gepc": GEPCConfig.model_validate({})}


class PretrainConfig(Config):
    """Everything that decides a pretraining run beside its cells: the recipe."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of ModelConfig; `vocab_size` follows from the vocabulary."""
    min_cells: int = Field(10, ge=0)
    """Genes that fewer training cells express are kept in the vocabulary, marked untrained, and not read."""
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    objectives: dict[str, AnyObjectiveConfig] = Field(default_factory=_generative, min_length=1)
    """By default the published ones: GEP with its second pass from the cell embedding, and GEPC."""
    train: TrainConfig = Field(default_factory=TrainConfig)

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, value: dict[str, AnyObjectiveConfig]) -> dict[str, AnyObjectiveConfig]:
        return each_kind_once(value)

    @field_validator("train")
    @classmethod
    def _asks(cls, value: TrainConfig) -> TrainConfig:
        if value.mode == "none":
            msg = "train.mode='none' asks for nothing, and pretraining learns from what is asked: 'ask' or 'hide'"
            raise ValueError(msg)
        return value

    @field_validator("model")
    @classmethod
    def _is_a_network(cls, value: dict[str, Any]) -> dict[str, Any]:
        ModelConfig.model_validate({"vocab_size": 1} | value)
        return value

    @classmethod
    def from_yaml(cls, text: str, *, where: str) -> PretrainConfig:
        """Read a recipe; `where` it came from stands in error messages."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            found = f"{where} is not YAML: {' '.join(str(error).split())}"
            raise input_error(found, "a recipe, such as the recipe.yaml of a run", "correct the line that is named") from None
        return cls.read(values or {}, where=where)

    def network(self, vocab: GeneVocab) -> ModelConfig:
        """Sizes of the network over `vocab`."""
        return ModelConfig.model_validate(self.model | {"vocab_size": len(vocab)})
