"""Our model -> what the authors' code reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from annformer.convert.table import HEADS, expand, numbers_of, refuse_unknown
from annformer.errors import input_error
from annformer.model.config import ModelConfig
from annformer.tokenizer import TokenizerSettings


class Authors(NamedTuple):
    """One of our models in the authors' terms."""

    args: dict[str, Any]
    weights: dict[str, Tensor]
    notes: list[str]


def to_authors(
    model: ModelConfig,
    tokenizer: TokenizerSettings,
    objectives: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Tensor],
    *,
    spelling: Literal["Wqkv", "in_proj"] = "Wqkv",
    drop: Collection[str] = (),
) -> Authors:
    """Convert one of our models into what the authors' code reads.

    Parameters
    ----------
    spelling
        Of the attention weights: "Wqkv" as in the published checkpoints, "in_proj" as their code writes it without flash-attn.
    drop
        Heads to leave out, `asked` for the vector of asked tokens, `profile` for the linear part of the cell embedding.

    Raises
    ------
    InputError
        With everything in the model that their code cannot express.
    """
    others = [name for name, there in (("asked", model.generative), ("profile", model.profile)) if there]
    refuse_unknown(drop, {*objectives, *others}, "head")
    without_profile = model.profile and "profile" in drop
    if without_profile:
        model = model.with_(profile=False)
    heads = {name: fields for name, fields in objectives.items() if name not in drop}
    generative = model.generative and "asked" not in drop
    if problems := _inexpressible(model, tokenizer, heads, generative=generative):
        found = f"the authors' code cannot express this model: {'; '.join(problems)}"
        raise input_error(
            found,
            "only what stands in their model classes",
            "keep it in annformer's format, or name heads and `asked` in `drop`: embeddings do not need them",
        )
    notes = [f"{name} has no weights: it is not part of their checkpoint" for name in heads if name not in HEADS]
    if without_profile:
        notes.append("without its profile the cell embedding, and what gepc makes of it, is that of <cls> alone: other numbers than here")
    if "gep" not in heads and "affine" not in heads:
        notes.append("without an expression head their loader leaves `decoder` at random")
    if model.attention_dropout != model.dropout:
        rates = f"dropout {model.dropout:g}, which acts on attention too; here that is {model.attention_dropout:g}"
        notes.append(f"their code has one {rates} (matters in training only)")
    if tokenizer.zeros != 0:
        notes.append(f"zeros={tokenizer.zeros}: their embed_data reads expressed genes alone")
    args = _args(model, tokenizer, heads, generative=generative)
    return Authors(args, _export(model, heads, weights, spelling, generative=generative), notes)


def _inexpressible(
    model: ModelConfig, tokenizer: TokenizerSettings, heads: Mapping[str, Mapping[str, Any]], *, generative: bool
) -> list[str]:
    flags, modality = model.n_flags > 0, model.n_modalities > 0
    gep, gepc, dar = heads.get("gep", {}), heads.get("gepc", {}), heads.get("dar", {})
    zero = {name: heads[name]["zero_probability"] for name in ("gep", "gepc", "affine") if name in heads}
    checks = {
        "dose: they have no dose": model.dose,
        "view: their cell embedding reads tokens only": model.view > 0,
        "profile: their cell embedding reads tokens only (drop `profile` for that of <cls> alone)": model.profile,
        "anchor: they have no such objective (drop it)": "anchor" in heads,
        "project_asked=True: their asked tokens do not pass through out_proj, so predictions would differ (drop `asked` to embed only)": (
            generative and model.project_asked
        ),
        f"n_flags={model.n_flags}: their pert_encoder has 3 rows": model.n_flags not in (0, 3),
        "flags beside batches, modalities or asked genes: their perturbation model has none of these": (
            flags and (model.input_norm != "none" or model.has_context or generative or "dar" in heads)
        ),
        "modalities in a generative model: their multi-omic model is not generative": modality and generative,
        "flags and the affine objective go together in their perturbation model, without gep": (
            (flags and "gep" in heads) or ("affine" in heads and not flags)
        ),
        "context_in_query: theirs is on with modalities, off without": bool(gepc)
        and model.has_context
        and gepc["context_in_query"] != modality,
        "gep with loss='ce': their decoder gives one value": gep.get("loss") == "ce",
        f"zero_probability={zero}: theirs is one switch, explicit_zero_prob, for all heads": len(set(zero.values())) > 1,
        "dar with other than 3 layers: their discriminator has 3": bool(dar) and dar["n_layers"] != 3,
        f"values={tokenizer.values!r}: they read raw values with flags, bins without": (tokenizer.values == "raw") != flags,
        f"n_bins={tokenizer.n_bins}: their collator bins into 51": not flags and tokenizer.n_bins != 51,
    }
    renamed = [f"objective {name!r} is a second {fields['kind']}" for name, fields in heads.items() if fields["kind"] != name]
    return renamed + [problem for problem, found in checks.items() if found]


def _export(
    model: ModelConfig, heads: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor], spelling: str, *, generative: bool
) -> dict[str, Tensor]:
    have = {
        "asked": generative,
        "flags": model.n_flags,
        "batch_context": model.batch_context,
        "modality": model.n_modalities,
        "batch_norm": model.input_norm == "batch",
        "domain_norm": model.input_norm == "domain",
    }
    parts = {"core", "layers", *heads, *(part for part, there in have.items() if there)}
    parts |= {f"{name}.nonzero" for name, fields in heads.items() if fields.get("zero_probability")}
    hidden = {name: heads[name]["n_layers"] - 1 if name in heads else 0 for name in ("cls", "dar")}
    theirs: dict[str, Tensor] = {}
    for row, number in expand(parts, numbers_of(model.n_layers, model.n_batches, hidden)):
        tensor = weights[row.ours.format(n=number)]
        tensor = torch.stack((torch.zeros_like(tensor), tensor)) if row.part == "asked" else tensor
        theirs[row.theirs.format(n=number)] = (tensor[number] if row.part == "domain_norm" else tensor).detach().clone().contiguous()
    if spelling == "in_proj":
        theirs = {re.sub(r"\.Wqkv\.(weight|bias)$", r".in_proj_\1", key): tensor for key, tensor in theirs.items()}
    return theirs


def _args(model: ModelConfig, tokenizer: TokenizerSettings, heads: Mapping[str, Mapping[str, Any]], *, generative: bool) -> dict[str, Any]:
    cls_value = tokenizer.cls_value
    args: dict[str, Any] = {
        "embsize": model.width,
        "nheads": model.n_heads,
        "d_hid": model.ff_width,
        "nlayers": model.n_layers,
        "n_layers_cls": heads["cls"]["n_layers"] if "cls" in heads else 3,
        "dropout": model.dropout,
        "pad_token": "<pad>",
        "pad_value": int(cls_value) if cls_value == int(cls_value) else cls_value,  # their embed_data gives <cls> the padding's value
        "cls_value": cls_value,  # read by nobody but our import: fine-tuning and pretraining differ in it
        "zeros": tokenizer.zeros,  # likewise
        "mask_value": -1,
        "n_bins": tokenizer.n_bins,
        "max_seq_len": tokenizer.max_length,
        "input_style": "binned",
        "input_emb_style": "continuous",
        "fast_transformer": True,
        "MVC": "gepc" in heads,
        "USE_GENERATIVE_TRAINING": generative,
    }
    if heads.get("gepc", {}).get("detach_genes"):
        args["mvc_decoder_style"] = "inner product, detach"
    if dar := heads.get("dar"):
        args["dab_weight"] = dar["weight"]
    if affine := heads.get("affine"):
        args["decoder_activation"] = "ReLU" if affine["activation"] == "relu" else None
        args["decoder_adaptive_bias"] = affine["adaptive_bias"]
    return args
