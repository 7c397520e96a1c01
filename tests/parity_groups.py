"""Ours against golden tensors of the reference: `test_parity.py` compares with `golden/`, `benchmarks/parity.py` with all there are.

A group yields `Difference`s: the largest difference at valid positions between a quantity of ours and the golden one, and the limit.
Golden arrays are padded, our batches packed: `Cells` says where the valid positions are. Groups whose files are absent yield nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn

from annformer.checkpoints import read_tensors
from annformer.convert import from_authors
from annformer.errors import InputError
from annformer.model.config import ModelConfig
from annformer.objectives import build
from annformer.objectives.cce import CCEConfig
from annformer.objectives.ecs import ECSConfig
from annformer.objectives.gepc import GEPC, GEPCConfig
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tokenizer import tokenize
from annformer.tokens import CellBatch, Encoded, TokenBatch
from annformer.vocab import GeneVocab

LIMIT = 1e-5
Golden = dict[str, Tensor]


class Difference(NamedTuple):
    group: str
    quantity: str
    value: float
    limit: float = LIMIT
    kind: str = "max abs"

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


class Cells(NamedTuple):
    """A packed batch made from padded arrays, and which padded positions it holds (row-major order is packed order)."""

    tokens: TokenBatch
    valid: Tensor

    def padded(self, golden: Tensor) -> Tensor:
        return golden[self.valid]


def load(path: Path) -> Golden:
    with np.load(path) as arrays:
        return {
            name: torch.from_numpy(np.atleast_1d(a)) if a.ndim else torch.tensor(a) for name, a in arrays.items() if a.dtype.kind in "fiub"
        }


def read_model(folder: Path, weights: Path | None = None, **args: Any) -> tuple[ScGPT, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """A converted model, and what translates its tensors (gradients, trained weights) from the authors' names into ours."""
    settings = json.loads((folder / "args.json").read_text()) | args
    vocab = GeneVocab.from_json(folder / "vocab.json")
    return model_of(settings, read_tensors(weights or folder / "best_model.pt"), vocab)


def model_of(
    args: Mapping[str, Any], state: dict[str, Tensor], vocab: GeneVocab
) -> tuple[ScGPT, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    converted = from_authors(args, state, vocab)
    config = ModelFolderConfig.model_validate(
        {"model": converted.model, "tokenizer": converted.tokenizer, "objectives": converted.objectives}
    )
    model = ScGPT(config, vocab)
    model.load_state_dict(converted.weights)

    def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_authors(args, state | dict(tensors), vocab).weights

    return model.eval(), translate


def pack(
    src: Tensor,
    values: Tensor,
    pad: Tensor,
    *,
    asked: tuple[Tensor, Tensor, Tensor] | None = None,
    target: Tensor | None = None,
    labels: Mapping[str, Tensor] | None = None,
    modality: Tensor | None = None,
    flags: Tensor | None = None,
) -> Cells:
    """Pack padded cells; `asked` = (genes, targets, pad) of the generative stream; else `target` counts where the value is hidden (-1)."""
    goal = torch.full_like(values, torch.nan)
    if target is not None:
        goal = torch.where(values == -1, target, goal)
    n_visible = (~pad).sum(1)
    if asked is not None:
        genes, targets, missing = asked
        src, values = torch.cat((src, genes), 1), torch.cat((values, torch.zeros_like(targets)), 1)
        goal, pad = torch.cat((goal, targets), 1), torch.cat((pad, missing), 1)
    valid = ~pad
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)))
    tokens = TokenBatch(
        gene_ids=src[valid],
        values=values[valid].float(),
        flags=None if flags is None else flags[valid],
        dose=None,
        offsets=offsets,
        n_visible=n_visible,
        targets=None if target is None and asked is None else goal[valid],
        modality=None if modality is None else modality[valid],
        labels=dict(labels or {}),
        cell=None,
    ).check()
    return Cells(tokens, valid)


def masked(z: Golden, **labels: Tensor) -> Cells:
    return pack(z["src"], z["values"], z["key_padding_mask"], target=z.get("target"), labels=labels, modality=z.get("mod_types"))


class Comparison:
    """Collects the differences of one group."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.found: list[Difference] = []

    def add(self, quantity: str, ours: Tensor, golden: Tensor, limit: float = LIMIT) -> None:
        assert ours.shape == golden.shape, f"{self.group} {quantity}: {tuple(ours.shape)} against {tuple(golden.shape)}"
        self.found.append(Difference(self.group, quantity, float((ours.detach().double() - golden.double()).abs().max()), limit))

    def add_relative(self, quantity: str, ours: Tensor, golden: Tensor, limit: float = LIMIT) -> None:
        """For losses on bins, which are of the order of 1,000: float32 carries seven digits of them."""
        self.found.append(Difference(self.group, quantity, float(((ours.detach() - golden) / golden).abs().max()), limit, "max rel"))

    def add_all(self, quantity: str, ours: Mapping[str, Tensor], golden: Mapping[str, Tensor], *, relative: bool, skip: str = "") -> None:
        """The worst tensor of many; relative to the largest entry of that tensor (at least 1e-3 of the largest of all)."""
        largest = max(float(golden[key].abs().max()) for key in ours)
        worst = 0.0
        for key, tensor in ours.items():
            if tensor.is_floating_point() and key != skip:
                a, b = set_aside(key, tensor), set_aside(key, golden[key])
                scale = max(float(b.abs().max()), 1e-3 * largest) if relative else 1.0
                worst = max(worst, float((a - b).abs().max()) / scale)
        self.found.append(Difference(self.group, quantity, worst, LIMIT, "max rel" if relative else "max abs"))


def set_aside(key: str, tensor: Tensor) -> Tensor:
    """Zero the entries whose gradient says nothing.

    A key bias shifts all scores of a query alike, and softmax takes it away: its gradient is rounding, which Adam blows up to full steps.
    The `<pad>` gene (200) and the flag 0 are frozen rows in theirs. We have no padding, and our flag 0 learns.
    """
    tensor = tensor.detach().double().clone()
    if key.endswith("qkv.bias"):
        tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
    if key in {"encoder.gene.weight", "encoder.flag.weight"}:
        tensor[200 if "gene" in key else 0] = 0
    return tensor


def outputs(model: ScGPT, cells: Cells, encoded: Encoded, z: Golden, at: Comparison, ecs: float) -> None:
    """Everything a forward pass of theirs returns, where the golden file has it."""
    heads, tokens = model.objectives, cells.tokens
    enc = z.get("enc", z.get("enc_flash"))
    if enc is not None:
        at.add("encoder output", encoded.states, cells.padded(enc))
    at.add("cell embedding", encoded.cell, z["out_cell_emb"])
    if "gep" in heads and "out_mlm_output" in z:
        prediction = heads["gep"].predict(encoded)
        at.add("GEP", prediction.value, cells.padded(z["out_mlm_output"]))
        if prediction.nonzero_logit is not None:
            at.add("GEP, non-zero probability", prediction.nonzero_logit.sigmoid(), cells.padded(z["out_mlm_zero_probs"]))
    if "gepc" in heads and "out_mvc_output" in z:
        prediction = heads["gepc"].predict(encoded, tokens)
        at.add("GEPC", prediction.value, cells.padded(z["out_mvc_output"]))
        if prediction.nonzero_logit is not None:
            at.add("GEPC, non-zero probability", prediction.nonzero_logit.sigmoid(), cells.padded(z["out_mvc_zero_probs"]))
    for name, key in (("cls", "out_cls_output"), ("dar", "out_dab_output")):
        if name in heads and key in z:
            at.add(name.upper(), heads[name].predict(encoded), z[key])
    if "out_loss_ecs" in z:
        at.add("ECS loss", loss_of(model, ECSConfig(threshold=ecs), encoded, tokens), z["out_loss_ecs"])


def loss_of(model: ScGPT, config: Any, encoded: Encoded, tokens: TokenBatch) -> Tensor:
    (loss,) = build(config, model.config.model).losses(encoded, tokens, model.encode).values()
    return loss.mean


# --- a: the published layout, perceptual and generative ------------------------------------------------------------------------------


def pretrain_forward(root: Path) -> Iterator[Difference]:
    model, _ = read_model(root / "a_pretrain")
    for case in ("forward", "forward_nopad"):
        if (path := root / f"a_pretrain/{case}.npz").is_file():
            z, at = load(path), Comparison(f"a {case}")
            cells = masked(z)
            encoded = model.encode(cells.tokens)
            outputs(model, cells, encoded, z, at, ecs=0.3)
            if "loss_mse" in z:
                at.add("CCE loss", loss_of(model, CCEConfig(temperature=0.5), encoded, cells.tokens), z["out_loss_cce"])
                for name, theirs in (("gep", "loss_mse"), ("gepc", "loss_mvc")):
                    loss = model.objectives[name].losses(encoded, cells.tokens, model.encode)[name].mean
                    at.add_relative(f"{name} loss", loss, z[theirs])
                at.add("values above 512", model.encoder.value(z["values_big"].flatten()).view(6, 40, -1), z["value_encoder_big"])
                at.add("gene embeddings", model.encoder.gene_embedding(torch.arange(len(model.vocab))), z["gene_encoder_all"])
                generated(model, z, at)
            yield from at.found


def generated(model: ScGPT, z: Golden, at: Comparison) -> None:
    """Their `generate`: the cell state replaces `<cls>`, the decoder predicts all genes.

    Without values their gene tokens carry nothing beside the gene, which no batch of ours expresses (a hidden value is -1, an asked one has
    its vector): the value encoder is set to give 0 for that.
    """
    for name, pad, values in (
        ("generate_values", z["key_padding_mask"], True),
        ("generate_novalues", z["key_padding_mask"], False),
        ("generate_nomask", torch.zeros_like(z["key_padding_mask"]), False),
    ):
        cells = pack(z["src"], z["values"], pad)
        norm = model.encoder.value.norm
        kept = norm.weight.detach().clone(), norm.bias.detach().clone()
        if not values:
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
        encoded = model.encode(cells.tokens._replace(cell=z["out_cell_emb"]))
        norm.load_state_dict({"weight": kept[0], "bias": kept[1]})
        at.add(name.replace("_", ", "), model.objectives["gep"].predict(encoded).value, cells.padded(z[name]))


def asked_cells(z: Golden, pad_id: int = 200) -> Cells:
    seen, asked = z["pcpt_gene"], z["gen_gene"]
    return pack(seen, z["pcpt_expr"], seen == pad_id, asked=(asked, z["gen_expr_target"], asked == pad_id))


def pretrain_generative(root: Path) -> Iterator[Difference]:
    for name in ("generative_nopad", "generative_pad"):
        if not (path := root / f"a_pretrain/{name}.npz").is_file():
            continue
        model, translate = read_model(root / "a_pretrain", dropout=0.0)
        z, at = load(path), Comparison(f"a {name}")
        cells = asked_cells(z)
        encoded = model.encode(cells.tokens)
        at.add("encoder output", encoded.states, cells.padded(torch.cat((z["enc_pcpt"], z["enc_gen"]), 1)))
        at.add("cell embedding", encoded.cell, z["out_cell_emb"])
        theirs = torch.cat((z["out_pcpt_preds"], z["out_gen_preds"]), 1)
        at.add("GEP", model.objectives["gep"].predict(encoded).value, cells.padded(theirs))
        at.add("GEPC", model.objectives["gepc"].predict(encoded, cells.tokens).value, cells.padded(z["out_mvc_output"]))
        at.add("ECS loss", loss_of(model, ECSConfig(threshold=0.3), encoded, cells.tokens), z["out_loss_ecs"])
        again = model.encode(cells.tokens._replace(cell=z["out_cell_emb"]))
        theirs = torch.cat((z["pass2_pcpt_preds"], z["pass2_gen_preds"]), 1)
        at.add("second pass, GEP", model.objectives["gep"].predict(again).value, cells.padded(theirs))
        at.add("second pass, cell embedding", again.cell, z["pass2_cell_emb"])
        seen = z["pcpt_gene"]
        only = pack(seen, z["pcpt_expr"], seen == 200)
        at.add("no genes asked", model.encode(only.tokens).states, only.padded(z["enc_pcpt_only"]))
        generative_gradients(model.train(), translate, cells, z, at)
        yield from at.found


def generative_gradients(model: ScGPT, translate: Callable[..., dict[str, Tensor]], cells: Cells, z: Golden, at: Comparison) -> None:
    losses = model.losses(cells.tokens)
    for ours, theirs in (("gep", "loss_mse"), ("gepc", "loss_mvc"), ("gep_cell_prompt", "loss_gen")):
        at.add_relative(f"{ours} loss", losses[ours].mean, z[theirs])
    sum(loss.mean for loss in losses.values()).backward()
    gradients(model, translate, z, at)


def gradients(model: ScGPT, translate: Callable[..., dict[str, Tensor]], z: Golden, at: Comparison, skip: str = "") -> None:
    theirs = translate(named(z, "grad."))
    ours = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    at.add_all("gradients", ours, theirs, relative=True, skip=skip)


def named(z: Golden, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in z.items() if key.startswith(prefix)}


def pretrain_training(root: Path) -> Iterator[Difference]:
    if not (path := root / "a_pretrain/train_traj.npz").is_file():
        return
    model, translate = read_model(root / "a_pretrain", dropout=0.0)
    z, at = load(path), Comparison("a train_traj")
    cells = asked_cells(z)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    for step, golden in enumerate(z["losses"]):
        losses = model.losses(cells.tokens)
        parts = torch.stack([losses[name].mean for name in ("gep", "gepc", "gep_cell_prompt")])
        at.add_relative(f"losses of step {step + 1}", parts, golden)
        step_with(optimizer, model, parts.sum())
    at.add_all("weights after 5 steps", dict(model.state_dict()), translate(named(z, "final.")), relative=False)
    yield from at.found


def step_with(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# --- b: integration -------------------------------------------------------------------------------------------------------------------

LOSSES_B = ("gep", "gep_nonzero", "gepc", "gepc_nonzero", "ecs", "dar")
GOLDEN_B = ("loss_mse", "loss_nzlp", "loss_mvc", "loss_mvc_nzlp", "loss_ecs", "loss_dab")


def losses_of_integration(model: ScGPT, encoded: Encoded, tokens: TokenBatch) -> dict[str, Tensor]:
    objectives = {name: head for name, head in model.objectives.items() if name != "cls"} | {
        "ecs": build(ECSConfig(threshold=0.8), model.config.model)
    }
    losses = {key: loss.mean for head in objectives.values() for key, loss in head.losses(encoded, tokens, model.encode).items()}
    return losses | {"ecs": 10 * losses["ecs"]}


def compare_losses(
    model: ScGPT, encoded: Encoded, tokens: TokenBatch, losses: dict[str, Tensor], golden: list[Tensor], at: Comparison, step: str = ""
) -> None:
    """Losses of a batch.

    For "non-zero", theirs takes the logarithm of a float32 probability; ours starts from the logit, which loses less. So the golden value
    is compared with their formula on our logits, and ours with the same in float64; how far ours is from the golden value is only told.
    """
    for name, theirs in zip(LOSSES_B, golden, strict=True):
        if not name.endswith("nonzero"):
            at.add_relative(f"{name} loss{step}", losses[name], theirs)
            continue
        head = model.objectives[name.removesuffix("_nonzero")]
        prediction = head.predict(encoded) if name.startswith("gep_") else head.predict(encoded, tokens)
        asked = torch.isfinite(tokens.targets)
        logit, positive = prediction.nonzero_logit[asked].detach(), tokens.targets[asked] > 0
        by_probability = torch.distributions.Bernoulli(probs=logit.sigmoid()).log_prob(positive.float())
        at.add_relative(f"{name} loss{step}, their formula", -by_probability.mean(), theirs)
        exact = F.binary_cross_entropy_with_logits(logit.double(), positive.double())
        at.add_relative(f"{name} loss{step}, against float64", losses[name], exact)
        at.add_relative(f"{name} loss{step}, ours (from logits)", losses[name], theirs, limit=math.inf)


def integration_forward(root: Path) -> Iterator[Difference]:
    model, _ = read_model(root / "b_integration")
    for name in ("forward_b0", "forward_b2", "forward_mixed"):
        if (path := root / f"b_integration/{name}.npz").is_file():
            z, at = load(path), Comparison(f"b {name}")
            labels = z["batch_labels"]
            first = torch.full_like(labels, int(labels[0]))  # theirs normalises every cell with the first one's statistics
            own = model.encode(masked(z, batch=labels).tokens)
            cells = masked(z, batch=first)
            encoded = model.encode(cells.tokens)._replace(context=own.context)
            outputs(model, cells, encoded, z, at, ecs=0.8)
            losses = losses_of_integration(model, encoded, cells.tokens._replace(labels={"batch": labels}))
            compare_losses(model, encoded, cells.tokens, losses, [z[key] for key in GOLDEN_B], at)
            yield from at.found


def integration_gradients(root: Path) -> Iterator[Difference]:
    if not (path := root / "b_integration/train_grad.npz").is_file():
        return
    model, translate = read_model(root / "b_integration", dropout=0.0)
    z, at = load(path), Comparison("b train_grad")
    cells = masked(z, batch=z["batch_labels"])
    encoded = model.train().encode(cells.tokens)
    losses = losses_of_integration(model, encoded, cells.tokens)
    compare_losses(model, encoded, cells.tokens, losses, [z[key] for key in GOLDEN_B], at)
    sum(losses.values()).backward()
    gradients(model, translate, z, at, skip="encoder.value.norm.bias")  # DSBN takes any constant away: its gradient is rounding
    after = translate(named(z, "buffer_after."))
    at.add_all("running statistics", {k: t for k, t in model.state_dict().items() if "running" in k}, after, relative=False)
    yield from at.found


def integration_training(root: Path) -> Iterator[Difference]:
    if not (path := root / "b_integration/train_traj.npz").is_file():
        return
    model, translate = read_model(root / "b_integration", dropout=0.0)
    z, at = load(path), Comparison("b train_traj")
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4, eps=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    z["key_padding_mask"] = torch.zeros_like(z["src"], dtype=torch.bool)
    for step, (label, golden) in enumerate(zip(z["batch_labels_per_step"], z["losses"], strict=True)):
        cells = masked(z, batch=label.repeat(len(z["src"])))
        encoded = model.encode(cells.tokens)
        losses = losses_of_integration(model, encoded, cells.tokens)
        compare_losses(model, encoded, cells.tokens, losses, list(golden[:6]), at, step=f", step {step + 1}")
        step_with(optimizer, model, sum(losses.values()))
        schedule.step()
    at.add_all("weights after 6 steps", dict(model.state_dict()), translate(named(z, "final.")), relative=False)
    yield from at.found


# --- c, d, e: annotation, perturbation, multi-omics -----------------------------------------------------------------------------------


def annotation(root: Path) -> Iterator[Difference]:
    if not (path := root / "c_annotation/forward.npz").is_file():
        return
    model, translate = read_model(root / "c_annotation", dropout=0.0)
    z, at = load(path), Comparison("c annotation")
    cells = masked(z, cell_type=z["labels"])
    encoded = model.encode(cells.tokens)
    outputs(model, cells, encoded, z, at, ecs=0.3)
    loss = model.objectives["cls"].losses(encoded, cells.tokens, model.encode)["cls"].mean
    at.add("cls loss", loss, z["loss_cls"])
    if (path := root / "c_annotation/train_grad.npz").is_file():
        loss.backward()
        gradients(model, translate, load(path), at)
    yield from at.found


PERTURBATION = {"default": {}, "adaptive": {"decoder_activation": "ReLU", "decoder_adaptive_bias": True}, "zero_prob": {}}


def perturbation(root: Path) -> Iterator[Difference]:
    folder = root / "d_perturbation"
    for name, args in PERTURBATION.items():
        path, weights = folder / f"forward_{name}.npz", folder / ("" if name == "default" else name) / "best_model.pt"
        if path.is_file() and weights.is_file():
            model, translate = read_model(folder, weights, dropout=0.0, **args)
            z, at = load(path), Comparison(f"d {name}")
            cells = perturbed(z)
            affine = model.objectives["affine"]
            encoded = model.encode(cells.tokens)
            prediction = affine.predict(encoded, cells.tokens)
            if name == "zero_prob":  # its expression is drawn at random
                at.add("affine, non-zero probability", prediction.nonzero_logit.sigmoid(), cells.padded(z["out_mlm_zero_probs"]))
            else:
                at.add("affine", prediction.value, cells.padded(z["out_mlm_output"]))
                at.add("prediction, all genes", prediction.value, cells.padded(z["pred_perturb_all"]))
                at.add("prediction, expressed genes", expressed_only(model, z), z["pred_perturb_batchwise"])
                loss = affine.losses(encoded, cells.tokens, model.encode)["affine"].mean
                at.add_relative("affine loss", loss, z["loss_mse"])
                if "gepc" in model.objectives:
                    at.add("GEPC", model.objectives["gepc"].predict(encoded, cells.tokens).value, cells.padded(z["out_mvc_output"]))
                loss.backward()
                gradients(model, translate, z, at)
            yield from at.found


def perturbed(z: Golden, columns: Tensor | None = None) -> Cells:
    """All genes visible with their value; the target is the perturbed value of every gene."""
    take = torch.arange(z["ids"].shape[1]) if columns is None else columns
    ids, values = z["ids"][:, take], z["values"][:, take]
    cells = pack(ids, values, torch.zeros_like(ids, dtype=torch.bool), flags=z["pert_flags"][:, take])
    return cells._replace(tokens=cells.tokens._replace(targets=z["target"][:, take].flatten()))


def expressed_only(model: ScGPT, z: Golden) -> Tensor:
    columns = (z["values"] != 0).any(0).nonzero()[:, 0]
    cells = perturbed(z, columns)
    result = torch.zeros_like(z["values"])
    result[:, columns] = model.objectives["affine"].predict(model.encode(cells.tokens), cells.tokens).value.detach().view(len(result), -1)
    return result


def multiomics(root: Path) -> Iterator[Difference]:
    folder = root / "e_multiomic"
    for name in ("default", "mod_only"):
        path, weights = folder / f"forward_{name}.npz", folder / ("" if name == "default" else name) / "best_model.pt"
        if path.is_file() and weights.is_file():
            model, _ = read_model(folder, weights)
            z, at = load(path), Comparison(f"e {name}")
            cells = masked(z, **({"batch": z["batch_labels"]} if "batch_labels" in z else {}))
            encoded = model.encode(cells.tokens)
            outputs(model, cells, encoded, z, at, ecs=0.0)
            for ours, theirs in (("gep", "loss_gep"), ("gepc", "loss_gepc"), ("dar", "loss_dab")):
                if theirs in z:
                    loss = model.objectives[ours].losses(encoded, cells.tokens, model.encode)[ours].mean
                    at.add_relative(f"{ours} loss", loss, z[theirs])
            yield from at.found


# --- embed_data -----------------------------------------------------------------------------------------------------------------------


def embeddings(model: ScGPT, path: Path, max_length: int, seed: int = 0) -> Tensor:
    adata = anndata.read_h5ad(path)
    ids = model.vocab.ids(adata.var["feature_name"])
    counts = csr_array(adata.X[:, ids >= 0])
    cells = CellBatch(counts.astype(np.float32), ids[ids >= 0], np.arange(adata.n_obs), {})
    settings = model.tokenizer.with_(max_length=max_length, seed=seed)
    return F.normalize(model.encode(tokenize(cells, settings, cls_id=model.vocab.cls_id), "cell").cell, dim=-1)


def embed_data(root: Path) -> Iterator[Difference]:
    folder = root / "embed_data"
    if not folder.is_dir():
        return
    model, _ = read_model(root / "a_pretrain")
    with torch.no_grad():
        at = Comparison("embed_data continuous")
        golden = load(folder / "continuous.npz")["X_scGPT_len1200_seed0"]
        at.add("X_scGPT", embeddings(model, folder / "continuous.h5ad", 1200), golden)
        yield from at.found
        counts = load(folder / "counts.npz")
        for length in (1200, 40):
            theirs = [counts[f"X_scGPT_len{length}_seed{seed}"] for seed in range(3)]
            ours = [embeddings(model, folder / "counts.h5ad", length, seed) for seed in range(N_SEEDS)]
            cosine = mean_cosines([*theirs, *ours])
            mine = range(3, 3 + N_SEEDS)
            # both draw at random: had ours been theirs, any three of our seeds could stand in their place
            by_chance = [excess(cosine, three, [seed for seed in mine if seed not in three]) for three in combinations(mine, 3)]
            quantity = f"max_length {length}: excess distance, against the largest among {len(by_chance)} triples of ours"
            yield Difference("embed_data counts", quantity, max(0.0, excess(cosine, (0, 1, 2), mine)), max(by_chance), "1 - mean cosine")


N_SEEDS = 12


def mean_cosines(runs: list[Tensor]) -> np.ndarray:
    """For every pair of runs the mean cosine of a cell with itself."""
    stacked = torch.stack(list(runs))
    return (torch.einsum("acw,bcw->ab", stacked, stacked) / stacked.shape[1]).numpy()


def excess(cosine: np.ndarray, three: Sequence[int], others: Sequence[int]) -> float:
    """How much farther three runs are from the others than among themselves."""
    among = np.mean([cosine[a, b] for a, b in combinations(three, 2)])
    return float(among - cosine[np.ix_(list(three), list(others))].mean())


# --- variants -------------------------------------------------------------------------------------------------------------------------

SUPPORTED = ("bn_simple", "dsbn_str", "batch_labels_only", "flash_impl_post", "mvc_detach")
REFUSED = ("do_affine_str", "avg_pool", "w_pool", "emb_category", "emb_scaling", "flash_impl_pre_norm")


def variant(root: Path, name: str) -> tuple[ScGPT, Golden]:
    folder = root / "variants" / name
    vocab = GeneVocab.from_json(root / "a_pretrain/vocab.json")
    model, _ = model_of(json.loads((folder / "config.json").read_text()), read_tensors(folder / "best_model.pt"), vocab)
    return model, load(folder / "forward.npz")


def variants(root: Path) -> Iterator[Difference]:
    for name in SUPPORTED:
        if (root / "variants" / name).is_dir():
            model, z = variant(root, name)
            at = Comparison(f"variant {name}")
            cells = masked(z, **({"batch": z["batch_labels"]} if "batch_labels" in z else {}))
            outputs(model, cells, model.encode(cells.tokens), z, at, ecs=0.8 if name != "flash_impl_post" else 0.3)
            yield from at.found
    if (path := root / "variants/mvc_decoder_inner_product.npz").is_file():
        yield from inner_product(load(path))


def inner_product(z: Golden) -> Iterator[Difference]:
    """The GEPC head alone, on states given from outside."""
    cells, genes, width = z["gene_embs"].shape
    head = GEPC(GEPCConfig(), ModelConfig(vocab_size=1, width=width, n_heads=1))
    head.load_state_dict({"query.weight": z["w.gene2query.weight"], "query.bias": z["w.gene2query.bias"], "value.weight": z["w.W.weight"]})
    batch = pack(torch.zeros(cells, genes, dtype=torch.long), torch.zeros(cells, genes), torch.zeros(cells, genes, dtype=torch.bool))
    states = z["gene_embs"].flatten(0, 1)
    encoded = Encoded(states=states, rows=None, genes=states, cell=z["cell_emb"], context=None)
    at = Comparison("variant mvc_decoder_inner_product")
    at.add("GEPC", head.predict(encoded, batch.tokens).value, z["pred"].flatten())
    yield from at.found


def refusals(root: Path) -> Iterator[tuple[str, str]]:
    """Variants that are refused, and the words."""
    for name in REFUSED:
        if (root / "variants" / name).is_dir():
            try:
                variant(root, name)
            except InputError as error:
                yield name, str(error).splitlines()[0].rsplit(": ", 1)[-1].rstrip(".")
            else:
                yield name, "ACCEPTED"


GROUPS: dict[str, Callable[[Path], Iterator[Difference]]] = {
    "a forward": pretrain_forward,
    "a generative": pretrain_generative,
    "a training": pretrain_training,
    "b forward": integration_forward,
    "b gradients": integration_gradients,
    "b training": integration_training,
    "c annotation": annotation,
    "d perturbation": perturbation,
    "e multi-omics": multiomics,
    "embed_data": embed_data,
    "variants": variants,
}
