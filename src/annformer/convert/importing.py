"""The authors' checkpoint -> ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from annformer.convert.table import HEADS, NUMBERED, SIZES, expand, numbers_of, refuse_unknown, row_of, tensor_error
from annformer.errors import input_error
from annformer.model.config import ModelConfig
from annformer.tokenizer import TokenizerSettings
from annformer.vocab import GeneVocab

# the same setting under the names that the authors' scripts, notebooks and constructors use
_ARGS = {
    "embsize": ("embsize", "layer_size", "d_model"),
    "nheads": ("nheads", "nhead"),
    "d_hid": ("d_hid",),
    "nlayers": ("nlayers",),
    "n_layers_cls": ("n_layers_cls", "nlayers_cls"),
}

_FINE_TUNED = {
    "domain_norm": "dsbn",
    "batch_norm": "bn",
    "batch_context": "batch labels",
    "modality": "modalities",
    "flags": "perturbation flags",
    "dar": "a discriminator of batches",
    "affine": "an affine decoder",
    "gep.nonzero": "zero probabilities",
    "gepc.nonzero": "zero probabilities",
}
"""Parts of a model that only their fine-tuning makes."""
_FINE_TUNING_ARGS = ("dataset_name", "ecs_thres", "dab_weight", "do_dab", "DSBN", "use_batch_labels", "explicit_zero_prob")
"""Settings that only their fine-tuning scripts have."""


class Converted(NamedTuple):
    """A checkpoint of the authors in our terms; `objectives` are the fields of each objective's settings."""

    model: ModelConfig
    tokenizer: TokenizerSettings
    objectives: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    notes: list[str]


class _Found(NamedTuple):
    """What the names and shapes of a checkpoint say about it."""

    parts: set[str]
    numbers: dict[str, Sequence[int]]
    sizes: dict[str, int]


def from_authors(args: Mapping[str, Any], state_dict: Mapping[str, Tensor], vocab: GeneVocab, *, drop: Collection[str] = ()) -> Converted:
    """Convert a checkpoint of the authors.

    Parameters
    ----------
    args
        Contents of `args.json`. Only the sizes, `dropout`, the names of architecture variants and what tells a fine-tuned model are read.
    state_dict
        Contents of `best_model.pt`, in any of their spellings.
    vocab
        Contents of `vocab.json`, with the special tokens.
    drop
        Heads to leave out: our names (`gep`, `gepc`, `cls`, `dar`, `affine`), or a module of theirs that we do not know.

    Raises
    ------
    InputError
        With every tensor that is missing, unexpected, misshaped or not finite, and every architecture variant that is not supported.
    """
    weights = _spelled(state_dict)
    _refuse_variants(args, weights)
    cls_value, said = _cls_value(args, weights)  # a fine-tuned model stays one when its heads are dropped
    weights, notes = _drop(weights, drop)
    found = _find(weights)
    _check_tensors(weights, found, vocab)
    _check_args(args, found)
    ours, casts = _import(weights, found)
    tokenizer = _tokenizer(args, found, cls_value)
    return Converted(_model_config(args, found), tokenizer, _objectives(args, found), ours, [*notes, *casts, said, *_notes(args, found)])


def _spelled(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring all spellings of the same tensor to the one of the published checkpoints."""
    spelled: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix("module.").replace("._impl.", ".").replace(".in_proj_", ".Wqkv.")
        if name in spelled:
            double = f"the checkpoint holds {origin[name]!r} and {key!r}, two spellings of the same tensor"
            raise input_error(double, "each tensor once", "save it again from one model")
        spelled[name], origin[name] = tensor, key
    return spelled


def _refuse_variants(args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    found = []
    style = args.get("input_emb_style", "continuous")
    if "value_encoder.embedding.weight" in weights or style == "category":
        found.append("input_emb_style='category'")
    elif style != "continuous" or (weights and not any(key.startswith("value_encoder.") for key in weights)):
        found.append(f"input_emb_style={style if style != 'continuous' else 'scaling'!r}")
    if (pool := args.get("cell_emb_style", "cls")) != "cls":
        found.append(f"cell_emb_style={pool!r}")
    query = str(args.get("mvc_decoder_style", "inner product"))
    if "mvc_decoder.fc1.weight" in weights or not query.startswith("inner product"):
        found.append(f"mvc_decoder_style={query if not query.startswith('inner') else 'concat query or sum query'!r}")
    if args.get("pre_norm"):
        found.append("pre_norm=True")
    if args.get("fast_transformer_backend", "flash") == "linear" or any(".attention.query_projection." in key for key in weights):
        found.append("fast_transformer_backend='linear'")
    if args.get("domain_spec_batchnorm") == "do_affine":
        found.append("domain_spec_batchnorm='do_affine'")
    if (activation := args.get("decoder_activation")) not in (None, "ReLU"):
        found.append(f"decoder_activation={activation!r}")
    if found:
        variants = f"the checkpoint uses variants of the architecture that annformer does not have: {', '.join(found)}"
        raise input_error(
            variants,
            "continuous values, <cls> pooling, post-norm, inner-product MVC, as in all published checkpoints",
            "use the authors' code for it, or train one without these options",
        )


def _cls_value(args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Any, str]:
    """Value at `<cls>`, and what to say about it: 0 in their fine-tuning, the padding's value in pretraining and zero-shot use."""
    if (value := args.get("cls_value")) is not None:
        return value, f"the value at <cls> is {value}: args.json says so"
    signs = {_FINE_TUNED[row[0].part]: None for key in weights if (row := row_of(key)) and row[0].part in _FINE_TUNED}
    classes = weights.get("cls_decoder.out_layer.weight")
    if classes is not None and classes.ndim and classes.shape[0] > 1 and not args.get("USE_CLS"):  # USE_CLS: a setting of pretraining
        signs["classes of cells"] = None
    signs |= {f"{name} in args.json": None for name in _FINE_TUNING_ARGS if args.get(name)}
    if signs:
        return 0, f"the value at <cls> is 0, as in their fine-tuning, for there are {', '.join(signs)} (`convert --cls_value` sets another)"
    value = args.get("pad_value", -2)
    return value, f"the value at <cls> is {value}, as in pretraining and zero-shot use: 0 for a fine-tuned model (`convert --cls_value 0`)"


def _drop(weights: dict[str, Tensor], drop: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    owner = {key: (row[0].part if (row := row_of(key)) else key).split(".")[0] for key in weights}
    droppable = {name for key, name in owner.items() if name in HEADS or row_of(key) is None}
    refuse_unknown(drop, droppable, "head")
    notes = [f"dropped on request: {name} ({sum(o == name for o in owner.values())} tensors)" for name in drop]
    return {key: tensor for key, tensor in weights.items() if owner[key] not in drop}, notes


def _find(weights: Mapping[str, Tensor]) -> _Found:
    matches = [row for key in weights if (row := row_of(key))]
    parts = {"core", "layers"} | {row.part for row, _ in matches} | {row.part.split(".")[0] for row, _ in matches}
    # a number beyond the number of tensors is no layer but a damaged name
    count = {part: max([-1, *(n for row, n in matches if row.part == part and n < len(weights))]) + 1 for part in NUMBERED}
    sizes = {letter: weights[key].shape[axis] for letter, key, axis in SIZES if key in weights and weights[key].ndim > axis}
    if "domain_norm" in parts:
        sizes.setdefault("B", count["domain_norm"])
    hidden = {head: (count[f"{head}.linear"] + 2) // 3 for head in ("cls", "dar")}
    return _Found(parts, numbers_of(max(1, count["layers"]), count["domain_norm"], hidden), _derived(sizes, parts))


def _derived(sizes: dict[str, int], parts: Collection[str]) -> dict[str, int]:
    sizes |= {"1": 1, "2": 2}
    if (width := sizes.get("E")) is None:
        return sizes
    context = "modality" in parts or "batch_context" in parts
    return sizes | {"3E": 3 * width, "D": width * (2 if context else 1), "Q": width * (2 if "modality" in parts else 1)}


def _check_tensors(weights: Mapping[str, Tensor], found: _Found, vocab: GeneVocab) -> None:
    expected = {row.theirs.format(n=n): row for row, n in expand(found.parts, found.numbers)}
    letters = {key: row.shape.split() for key, row in expected.items()}
    shapes = {key: tuple(found.sizes[letter] for letter in names) for key, names in letters.items() if set(names) <= found.sizes.keys()}
    both = [key for key in weights if key in expected]
    problems = [f"missing: {key}" for key in expected if key not in weights]
    problems += [f"unexpected: {key} {tuple(tensor.shape)}" for key, tensor in weights.items() if key not in expected]
    problems += [
        f"misshaped: {k} is {tuple(weights[k].shape)}, expected {shapes[k]}"
        for k in both
        if tuple(weights[k].shape) != shapes.get(k, weights[k].shape)
    ]
    problems += [f"not finite: {key}" for key in both if not bool(torch.isfinite(weights[key]).all())]
    problems += [
        f"not numbers: {k} is {weights[k].dtype}" for k in both if not (weights[k].is_floating_point() or k.endswith("num_batches_tracked"))
    ]
    if "encoder.embedding.weight" in weights and found.sizes.get("V") != len(vocab):
        problems.append(f"vocabulary: vocab.json has {len(vocab)} tokens, encoder.embedding.weight {found.sizes.get('V')} rows")
    if "domain_norm" in found.parts and found.sizes["B"] != len(found.numbers["domain_norm"]):
        problems.append(f"batches: batch_encoder has {found.sizes['B']}, dsbn {len(found.numbers['domain_norm'])}")
    if {"domain_norm", "batch_norm"} <= found.parts:
        problems.append("both bn and dsbn are there; a model has one of them")
    if problems:
        where = "the checkpoint"
        raise tensor_error(where, problems, "the tensors of one of the authors' models, complete")


def _argument(args: Mapping[str, Any], name: str) -> Any:
    return next((args[key] for key in _ARGS[name] if args.get(key) is not None), None)


def _check_args(args: Mapping[str, Any], found: _Found) -> None:
    shapes = {"embsize": found.sizes["E"], "d_hid": found.sizes["F"], "nlayers": len(found.numbers["layers"])}
    if "cls" in found.parts:
        shapes["n_layers_cls"] = len(found.numbers["cls.linear"]) + 1
    said = {name: _argument(args, name) for name in shapes}
    wrong = [f"{name} is {said[name]!r}, by the tensors {size}" for name, size in shapes.items() if said[name] not in (None, size)]
    if wrong:
        contradiction = f"args.json and best_model.pt contradict each other: {'; '.join(wrong)}"
        raise input_error(
            contradiction, "the args.json that was written with these weights", "bring the two files of one training run together"
        )
    heads = _argument(args, "nheads")
    if not isinstance(heads, int) or heads < 1 or found.sizes["E"] % heads:
        impossible = f"args.json gives nheads={heads!r} for weights that are {found.sizes['E']} wide"
        raise input_error(
            impossible,
            "a number of attention heads that divides the width",
            "write the number of heads that the model was trained with into args.json",
        )


def _import(weights: Mapping[str, Tensor], found: _Found) -> tuple[dict[str, Tensor], list[str]]:
    ours: dict[str, Tensor] = {}
    domains: dict[str, list[Tensor]] = {}
    for key, tensor in weights.items():
        match = row_of(key)
        assert match is not None, f"{key} passed the check"
        row, number = match
        if row.part == "domain_norm":
            domains.setdefault(row.ours, [tensor] * len(found.numbers["domain_norm"]))[number] = tensor
        else:
            ours[row.ours.format(n=number)] = tensor[1] if row.part == "asked" else tensor
    ours |= {name: torch.stack(tensors) for name, tensors in domains.items()}
    other = sorted({str(t.dtype) for t in ours.values() if t.is_floating_point() and t.dtype != torch.float32})
    notes = [f"weights stored as {', '.join(other)} were converted to float32"] if other else []
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in ours.items()}, notes


def _model_config(args: Mapping[str, Any], found: _Found) -> ModelConfig:
    parts, sizes = found.parts, found.sizes
    fields = {
        "vocab_size": sizes["V"],
        "width": sizes["E"],
        "n_heads": _argument(args, "nheads"),
        "n_layers": len(found.numbers["layers"]),
        "ff_width": sizes["F"],
        "dropout": args.get("dropout", 0.2),
        "input_norm": "domain" if "domain_norm" in parts else "batch" if "batch_norm" in parts else "none",
        "n_batches": sizes.get("B", 0),
        "batch_context": "batch_context" in parts,
        "n_modalities": sizes.get("M", 0),
        "n_flags": sizes.get("S", 0),
        "generative": "asked" in parts,
        "project_asked": "asked" not in parts,
    }
    return ModelConfig.read(fields, where="args.json with best_model.pt")


def _tokenizer(args: Mapping[str, Any], found: _Found, cls_value: object) -> TokenizerSettings:
    fields = {
        "n_bins": args.get("n_bins") or 51,
        "max_length": args.get("max_seq_len") or 1200,
        "cls_value": cls_value,
        "zeros": args.get("zeros") or 0.0,  # of ours that went to their format; what they call include_zero_gene is said in the notes
        "values": "raw" if "flags" in found.parts else "bins",  # their perturbation model reads expression as it is
    }
    return TokenizerSettings.read(fields, where="args.json")


def _objectives(args: Mapping[str, Any], found: _Found) -> dict[str, dict[str, Any]]:
    detach = str(args.get("mvc_decoder_style", "")).endswith("detach")
    activation = "relu" if args.get("decoder_activation") == "ReLU" else None
    fields: dict[str, dict[str, Any]] = {
        "gep": {"n_bins": args.get("n_bins") or 51, "cell_prompt": "asked" in found.parts},
        "gepc": {"detach_genes": detach, "context_in_query": "modality" in found.parts},
        "cls": {"n_classes": found.sizes.get("C"), "n_layers": len(found.numbers["cls.linear"]) + 1},
        "dar": {"n_batches": found.sizes.get("A"), "n_layers": len(found.numbers["dar.linear"]) + 1, "weight": args.get("dab_weight", 1.0)},
        "affine": {"activation": activation, "adaptive_bias": bool(args.get("decoder_adaptive_bias"))},
    }
    for name in ("gep", "gepc", "affine"):
        fields[name]["zero_probability"] = f"{name}.nonzero" in found.parts
    return {name: {"kind": name} | fields[name] for name in HEADS if name in found.parts}


def _notes(args: Mapping[str, Any], found: _Found) -> list[str]:
    notes = []
    if "asked" in found.parts:
        notes.append("flag_encoder.weight[0] was left out: the authors' code reads row 1 only")
    if found.sizes.get("C") == 1:
        notes.append("cls_decoder has one class: their code always builds it; name `cls` in `drop` if it was never trained")
    if "domain_norm" in found.parts:
        notes.append(
            "dsbn: each cell is normalised by its own batch; their code takes the first cell's batch for all cells of a mini-batch"
        )
    if args.get("include_zero_gene"):
        said = "it was fine-tuned with the zeros of its genes (include_zero_gene)"
        notes.append(f"{said}; expressed genes alone are read here, as by their embed_data")
    if args.get("dropout"):
        notes.append("dropout acts on residuals and feed-forward; theirs also on attention (set attention_dropout for that)")
    return notes
