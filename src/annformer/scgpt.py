"""ScGPT: the network, its objectives, its vocabulary and its tokenizer settings as one model that is saved and loaded as one folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, JsonValue, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from annformer import checkpoints
from annformer.config import Config
from annformer.convert import from_authors, refuse_unknown, tensor_error, to_authors
from annformer.errors import AnnformerWarning, input_error
from annformer.model.config import ModelConfig
from annformer.model.encoder import CellEncoder, Wanted
from annformer.objectives import AnyObjectiveConfig, Loss, Objective, build, each_kind_once
from annformer.tokenizer import TokenizerSettings, tokenize
from annformer.tokens import CellBatch, Encoded, TokenBatch
from annformer.vocab import GeneVocab

FORMAT = 1
"""Number of the format of `config.json` and of the names in `model.safetensors`."""
YOUNGER = frozenset({"tokenizer.zeros", "model.view", "model.profile"})
"""Settings that older folders of this format lack; the default says what was done before they existed."""
HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"
"""Form of a repository's name on the Hugging Face Hub, with or without a revision."""
DEFAULT_MODEL = "annformer-base"
"""Model of everything that takes one and is not told which: it ships with the package."""


class ModelFolderConfig(Config):
    """What `config.json` of a model folder says."""

    format: Literal[1] = 1
    model: ModelConfig
    tokenizer: TokenizerSettings = TokenizerSettings.read({}, where="defaults")
    objectives: dict[str, AnyObjectiveConfig] = Field(default_factory=dict)
    """By name, which is also the name of the head's tensors."""
    untrained_genes: tuple[str, ...] = ()
    """Genes of the vocabulary that the training cells hardly express: their rows mean nothing, and no data are read for them."""
    panel: tuple[str, ...] = ()
    """Genes that a fine-tuned model reads, in the order of its expression view if it has one; none: all that the vocabulary knows."""
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """Where the weights come from: `name`, and whatever its maker wrote down."""

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, value: dict[str, AnyObjectiveConfig]) -> dict[str, AnyObjectiveConfig]:
        return each_kind_once(value)


class ScGPT(nn.Module):
    """A foundation model of cells: transformer, objectives, vocabulary, tokenizer settings.

    Parameters
    ----------
    config
        Sizes, settings, objectives. Weights are random; `from_pretrained` reads them.
    vocab
        The genes behind the rows of the gene table. Which of them are untrained is taken from here, whatever `config` says.
    """

    objectives: nn.ModuleDict

    def __init__(self, config: ModelFolderConfig, vocab: GeneVocab) -> None:
        super().__init__()
        if len(vocab) != config.model.vocab_size:
            found = f"the vocabulary has {len(vocab)} tokens, the model {config.model.vocab_size} rows for them"
            raise input_error(found, "as many tokens as rows", "use the vocab.json that belongs to the model")
        untrained = tuple(token for token in vocab.tokens if token in vocab.untrained)
        self.config = config if config.untrained_genes == untrained else config.model_copy(update={"untrained_genes": untrained})
        self.vocab = vocab
        self.panel = self._panel_ids()
        self.encoder = CellEncoder(config.model)
        self.objectives = nn.ModuleDict({name: build(settings, config.model) for name, settings in config.objectives.items()})

    @classmethod
    def from_pretrained(cls, source: str | Path, *, drop: Collection[str] = (), device: torch.device | str = "cpu") -> Self:
        """Load a model, in evaluation mode.

        Parameters
        ----------
        source
            A model folder, a checkpoint folder of scGPT's authors (`args.json`, `vocab.json`, `best_model.pt`), a named checkpoint such as
            "annformer-base", which ships with the package, or "scgpt-human", or "org/repository" on the Hugging Face Hub.
        drop
            Objectives to leave out with their heads.

        Raises
        ------
        InputError
            When there is no such model, or with every tensor that is missing, unexpected, misshaped or not finite.
        """
        folder = locate(source)
        read = _read_ours if (folder / "config.json").is_file() else _read_authors
        config, vocab, weights = read(folder, drop)
        with _Uninitialised():
            model = cls(config, vocab)
        model.load_state_dict(weights)
        return model.to(device).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: str | None = None,
        parts: Mapping[str, Mapping[str, Tensor]] | None = None,
        half: bool = False,
    ) -> None:
        """Write `config.json`, `vocab.json`, `model.safetensors` and `README.md`, whole or not at all.

        A model that stands there is replaced; a folder with anything else in it is refused.

        Parameters
        ----------
        card
            Text of the model card; by default one is made from the settings.
        parts
            Tensors of an estimator that are no weights of the network, by the name of the file that they become
            (`checkpoints.PART_FILES`).
        half
            Write float16 numbers, which takes half the room; read, they are float32 again.
        """

        def fill(fresh: Path) -> None:
            (fresh / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            self.vocab.to_json(fresh / "vocab.json")
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            if half:
                weights = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
            save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
            (fresh / "README.md").write_text(card if card is not None else self._card(), encoding="utf-8")
            for name, tensors in (parts or {}).items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fresh / name)

        checkpoints.write_folder(Path(folder), (*checkpoints.MODEL_FILES, *checkpoints.PART_FILES), fill)

    def save_for_authors(
        self, folder: str | Path, *, spelling: Literal["Wqkv", "in_proj"] = "Wqkv", drop: Collection[str] = ()
    ) -> list[str]:
        """Write a checkpoint that the authors' code reads; return what a user of it should know.

        Parameters
        ----------
        spelling
            Of the attention weights: "Wqkv" as in the published checkpoints, "in_proj" as their code writes it without flash-attn.
        drop
            Objectives to leave out, `asked` for the vector of asked tokens, `profile` for the linear part of the cell embedding.

        Raises
        ------
        InputError
            With everything in this model that their code cannot express.
        """
        objectives = {name: settings.model_dump() for name, settings in self.config.objectives.items()}
        theirs = to_authors(self.config.model, self.tokenizer, objectives, self.state_dict(), spelling=spelling, drop=drop)
        checkpoints.write_authors(Path(folder), theirs.args, self.vocab, theirs.weights)
        if not (n_untrained := len(self.vocab.untrained)):
            return theirs.notes
        unread = f"{n_untrained:,} genes of the vocabulary are untrained: annformer does not read them"
        return [*theirs.notes, f"{unread}, their code will, unless you leave them out of the data"]

    def tokenize(self, cells: CellBatch, settings: TokenizerSettings | None = None) -> TokenBatch:
        """Cells as tokens of this model; `settings` stand in for its own."""
        view = self.config.model.view > 0
        profile = self.config.model.profile
        return tokenize(cells, settings or self.tokenizer, cls_id=self.vocab.cls_id, panel=self.panel, view=view, profile=profile)

    @property
    def tokenizer(self) -> TokenizerSettings:
        """How cells become tokens for this model."""
        return self.config.tokenizer

    @property
    def name(self) -> str:
        """What the model is called in results."""
        return str(self.config.provenance.get("name", "unnamed"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of settings, vocabulary and weights: results of two models with the same fingerprint may be mixed."""
        unused: dict[str, Any] = {"provenance": True}  # and what older models never heard of, where it says nothing
        if not self.config.panel:
            unused["panel"] = True
        if silent := {name for name in ("view", "profile") if not getattr(self.config.model, name)}:
            unused["model"] = silent
        digest = hashlib.sha256(self.config.model_dump_json(exclude=unused).encode())
        digest.update("\n".join(self.vocab.tokens).encode())
        for key, tensor in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(self, tokens: TokenBatch, wanted: Wanted = "all") -> Encoded:
        """States of a packed batch; `wanted` says which of them the last layer computes."""
        encoded: Encoded = self.encoder(tokens, wanted)
        return encoded

    def require_no_batch(self) -> None:
        """Raise InputError when the network reads more than genes and values: a batch label of each cell, a modality of each gene."""
        config = self.config.model
        labels = ["batch label for every cell"] if config.input_norm == "domain" or config.batch_context else []
        labels += ["modality for every gene"] if config.n_modalities else []
        if labels:
            found = f"the model {self.name} was fine-tuned with a {' and a '.join(labels)}"
            raise input_error(found, "a model that reads genes and values only", "embed with the pretrained model it was made from")

    def _panel_ids(self) -> Int[np.ndarray, "panel"] | None:
        names, view = self.config.panel, self.config.model.view
        if unknown := [name for name in names if name not in self.vocab]:
            found = f"the panel has {len(unknown)} genes that the vocabulary lacks, such as {unknown[0]!r}"
            raise input_error(found, "genes of the vocabulary", "use the files of the model as they were written")
        if view not in (0, len(names)):
            found = f"the view reads {view} genes, the panel has {len(names)}"
            raise input_error(found, "a view of the whole panel", "use the files of the model as they were written")
        return np.array([self.vocab[name] for name in names], np.int64) if names else None

    def losses(self, tokens: TokenBatch) -> dict[str, Loss]:
        """Losses of all objectives by name, unweighted; each objective has its own `weight`."""
        wanted: Wanted = "cell" if tokens.targets is None else "targets"

        def encode(batch: TokenBatch) -> Encoded:
            return self.encode(batch, wanted)

        encoded = encode(tokens)
        losses: dict[str, Loss] = {}
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            losses |= objective.losses(encoded, tokens, encode)
        return losses

    def _card(self) -> str:
        config, model = self.config, self.config.model
        made = "\n".join(f"- {key}: {json.dumps(value)}" for key, value in config.provenance.items()) or "- not recorded"
        return f"""# {self.name}

A foundation model of single cells in the format of annformer (format {config.format}).

- vocabulary: {len(self.vocab.genes):,} genes, {len(self.vocab.untrained):,} of them untrained
- network: {model.n_layers} layers, {model.width} wide, {model.n_heads} heads, {sum(p.numel() for p in self.parameters()):,} parameters
- tokens: {config.tokenizer.values}, {config.tokenizer.n_bins} bins, at most {config.tokenizer.max_length} per cell
- objectives: {", ".join(config.objectives) or "none"}

## Where it comes from

{made}

## Use

```python
import annformer as af

{_USES.get(str(config.provenance.get("task")), _USES[""])}
```

For research. What the model was trained on limits what it knows: check it against a simple method on your own cells.
"""


class _Uninitialised(TorchFunctionMode):
    """Modules built inside keep the memory they were given: their weights are read from a file right after.

    PyTorch's own way, the meta device, imports its compiler on first use, which takes seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _ShapesOnly(_Uninitialised):
    """Tensors built inside have a shape and next to no memory: the settings of a damaged folder may ask for more than there is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn):
            shape = args if isinstance(args[0], int) else args[0]
            return torch.zeros((), dtype=(kwargs or {}).get("dtype")).expand(shape)
        if func in (Tensor.zero_, Tensor.fill_):  # would go through all the places that share the memory
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def is_checkpoint_name(source: str | Path) -> bool:
    """Whether `source`, when there is no such path, can be fetched: the name of a checkpoint, or has the form "org/repository"."""
    named = any(str(source) in names for names in (checkpoints.SHIPPED, checkpoints.CHECKPOINTS, checkpoints.BY_HAND))
    return named or (isinstance(source, str) and re.fullmatch(HUB_NAME, source) is not None)


def locate(source: str | Path) -> Path:
    """Find the folder of a model that `ScGPT.from_pretrained` takes, fetching it when it is a name.

    Raises
    ------
    InputError
        When there is no such model.
    """
    folder, name = Path(source).expanduser(), str(source)
    if name in checkpoints.SHIPPED and not (isinstance(source, Path) and folder.is_dir()):
        if folder.is_dir():
            msg = f"{name!r} is the model that ships with annformer; to take the folder of this name here, say './{name}'"
            warnings.warn(msg, AnnformerWarning, stacklevel=2)
        return checkpoints.shipped(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        found = f"{source} is a file"
        raise input_error(found, "the folder of a model", "give the folder that holds config.json, or args.json")
    if name in checkpoints.CHECKPOINTS or name in checkpoints.BY_HAND:
        return checkpoints.fetch(name, progress=True)
    if is_checkpoint_name(source):
        return checkpoints.fetch_from_hub(name)
    known = checkpoints.known_names()
    near = difflib.get_close_matches(name, known)
    found = f"there is no model {name!r}"
    remedy = f"did you mean {', '.join(near)}" if near else "check the path"
    raise input_error(found, f"a folder, 'org/repository' on the Hugging Face Hub, or one of {', '.join(known)}", remedy)


_USES = {
    "": 'model = af.ScGPT.from_pretrained("this folder")\naf.embed(adata, model)',
    "annotation": 'af.CellTypeClassifier.load("this folder").predict(adata)  # obs["predicted_cell_type"]',
    "integration": 'af.BatchIntegrator.load("this folder").transform(adata)  # obsm["X_annformer"]',
}
"""What the card of a model shows, by the task that it was fine-tuned for."""
_Read = tuple[ModelFolderConfig, GeneVocab, Mapping[str, Tensor]]


def _read_authors(folder: Path, drop: Collection[str]) -> _Read:
    if not (folder / "args.json").is_file() and not (folder / "best_model.pt").is_file():
        checkpoints.require_files(folder, checkpoints.MODEL_FILES[:3])
    args, vocab, tensors = checkpoints.read_authors(folder)
    converted = from_authors(args, tensors, vocab, drop=drop)
    fields = {
        "model": converted.model,
        "tokenizer": converted.tokenizer,
        "objectives": converted.objectives,
        "provenance": {"name": folder.name, "made_by": "the authors' scGPT code, converted", "notes": converted.notes},
    }
    return ModelFolderConfig.read(fields, where=str(folder / "args.json")), vocab, converted.weights


def _read_ours(folder: Path, drop: Collection[str]) -> _Read:
    checkpoints.require_files(folder, checkpoints.MODEL_FILES[:3])
    config = read_config(folder)
    refuse_unknown(drop, config.objectives, "head")
    kept = config.with_(objectives={name: settings.model_dump() for name, settings in config.objectives.items() if name not in drop})
    vocab = GeneVocab.from_json(folder / "vocab.json", config.untrained_genes)
    path = folder / "model.safetensors"
    weights = _read_safetensors(path)
    _require_room(path, config, len(weights))
    with _ShapesOnly():
        expected = ScGPT(config, vocab).state_dict()
    _require_fit(path, weights, expected)
    dropped = tuple(f"objectives.{name}." for name in drop)
    return kept, vocab, {key: tensor for key, tensor in weights.items() if not key.startswith(dropped)} if dropped else weights


def read_config(folder: Path) -> ModelFolderConfig:
    """Read `config.json` of a model folder of ours, in which no setting of network and tokenizer may be missing: a default may be wrong.

    Raises
    ------
    InputError
        When it has another format, or with every setting that is missing, unknown or out of range.
    """
    path = folder / "config.json"
    fields = checkpoints.read_json(path)
    if (number := fields.get("format")) != FORMAT:
        found = f"{path} has format {number!r}"
        remedy = "install the newer annformer that wrote it" if isinstance(number, int) and number > FORMAT else "give a model of annformer"
        raise input_error(found, f"format {FORMAT}", remedy)
    config = ModelFolderConfig.read(fields, where=str(path))
    parts: tuple[tuple[str, type[Config]], ...] = (("model", ModelConfig), ("tokenizer", TokenizerSettings))
    known = {f"{part}.{name}" for part in ("model", "tokenizer") for name in fields.get(part, {})} | YOUNGER
    if missing := [name for part, settings in parts for field in settings.model_fields if (name := f"{part}.{field}") not in known]:
        found = f"{path} lacks {', '.join(missing)}"
        raise input_error(found, "every setting of model and tokenizer, as save_pretrained writes them", "use the file as it was written")
    return config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no iterator
    except (SafetensorError, OSError) as error:
        found = f"{path} cannot be read: {error}"
        raise input_error(found, "a safetensors file, complete", "copy or save the model again") from None


def _require_room(path: Path, config: ModelFolderConfig, n_tensors: int) -> None:
    """Refuse sizes that no tensor in the file can have, before anything of that size is built."""
    sizes = {"model": config.model.model_dump()} | {f"objectives.{name}": o.model_dump() for name, o in config.objectives.items()}
    room = path.stat().st_size
    problems = [
        f"{where}.{name} is {size}, with {n_tensors} tensors of {room} bytes in all"
        for where, fields in sizes.items()
        for name, size in fields.items()
        if isinstance(size, int) and size > (n_tensors if name == "n_layers" else room)
    ]
    if problems:
        raise tensor_error(str(path), problems, "the tensors that config.json describes, complete")


def _require_fit(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"missing: {key}" for key in expected if key not in weights]
    problems += [f"unexpected: {key} {tuple(tensor.shape)}" for key, tensor in weights.items() if key not in expected]
    for key in sorted(expected.keys() & weights.keys()):
        have, want = weights[key], expected[key]
        half = have.dtype == torch.float16 and want.dtype == torch.float32
        if have.shape != want.shape or (have.dtype != want.dtype and not half):
            problems.append(f"misshaped: {key} is {have.dtype} {tuple(have.shape)}, expected {want.dtype} {tuple(want.shape)}")
        elif not bool(torch.isfinite(have).all()):
            problems.append(f"not finite: {key}")
    if problems:
        raise tensor_error(str(path), problems, "the tensors that config.json describes, complete")
