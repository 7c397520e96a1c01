"""The authors' checkpoints <-> ours: names, spellings, strictness, both directions."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from annformer.checkpoints import read_tensors
from annformer.cli import main
from annformer.convert import TABLE, from_authors, to_authors
from annformer.convert.table import expand, numbers_of
from annformer.errors import InputError
from annformer.model.config import ModelConfig
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tokens import TokenBatch
from annformer.vocab import GeneVocab

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("a_pretrain", "b_integration", "c_annotation", "d_perturbation", "e_multiomic")
State = dict[str, Tensor]


def read(name: str) -> tuple[dict[str, Any], State, GeneVocab]:
    folder = GOLDEN / name
    return (
        json.loads((folder / "args.json").read_text()),
        read_tensors(folder / "best_model.pt"),
        GeneVocab.from_json(folder / "vocab.json"),
    )


@pytest.fixture
def pretrained() -> tuple[dict[str, Any], State, GeneVocab]:
    return read("a_pretrain")


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_table_names_every_tensor_once() -> None:
    for names in ([row.theirs for row in TABLE], [row.ours for row in TABLE if row.part != "domain_norm"]):
        # a classifier's Linear and LayerNorm share the pattern and differ in the running number
        names = [
            name for name in names if "_decoder.{n}" not in name and ".layers.{n}.weight" not in name and ".layers.{n}.bias" not in name
        ]
        assert len(names) == len(set(names))


def test_published_checkpoint_has_163_tensors() -> None:
    assert len(list(expand({"core", "layers", "asked", "gep", "gepc"}, numbers_of(12, 0, {})))) == 163


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: f"module.{key}",
        lambda key: key.replace("self_attn.", "self_attn._impl."),
        lambda key: key.replace("Wqkv.", "in_proj_"),
        lambda key: "module." + key.replace("Wqkv.", "in_proj_"),
    ],
    ids=["DDP", "_impl", "in_proj", "DDP and in_proj"],
)
def test_spellings(pretrained: tuple[dict[str, Any], State, GeneVocab], spell: Any) -> None:
    args, state, vocab = pretrained
    plain, spelled = from_authors(args, state, vocab), from_authors(args, {spell(key): tensor for key, tensor in state.items()}, vocab)
    assert same(plain.weights, spelled.weights)
    assert plain.model == spelled.model


@pytest.mark.parametrize("spelling", ["Wqkv", "in_proj"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_there_and_back(name: str, spelling: Any) -> None:
    args, state, vocab = read(name)
    ours = from_authors(args, state, vocab)
    theirs = to_authors(ours.model, ours.tokenizer, ours.objectives, ours.weights, spelling=spelling)
    again = from_authors(theirs.args, theirs.weights, vocab)
    assert same(again.weights, ours.weights)
    assert (again.model, again.tokenizer, again.objectives) == (ours.model, ours.tokenizer, ours.objectives)
    before = {key.replace("Wqkv.", "in_proj_"): tensor for key, tensor in state.items() if key != "flag_encoder.weight"}
    after = {key.replace("Wqkv.", "in_proj_"): tensor for key, tensor in theirs.weights.items() if key != "flag_encoder.weight"}
    assert same(before, after)


def test_asked_vector_is_row_one(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    ours = from_authors(args, state, vocab)
    assert torch.equal(ours.weights["encoder.asked"], state["flag_encoder.weight"][1])
    assert ours.model.generative
    assert not ours.model.project_asked
    assert any("flag_encoder.weight[0]" in note for note in ours.notes)


def test_settings_come_from_shapes(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    _, state, vocab = pretrained
    ours = from_authors({"nheads": 4}, state, vocab)
    assert ours.model == ModelConfig(
        vocab_size=203, width=32, n_heads=4, n_layers=2, ff_width=48, dropout=0.2, generative=True, project_asked=False
    )
    assert (ours.tokenizer.n_bins, ours.tokenizer.max_length, ours.tokenizer.cls_value) == (51, 1200, -2.0)


def test_zeros_are_told_both_ways(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    ours, tuned = from_authors(args, state, vocab), from_authors(args | {"include_zero_gene": True}, state, vocab)
    assert ours.tokenizer.zeros == tuned.tokenizer.zeros == 0
    assert [note for note in tuned.notes if "include_zero_gene" in note]
    assert not [note for note in ours.notes if "include_zero_gene" in note]
    theirs = to_authors(ours.model, ours.tokenizer.with_(zeros="all"), ours.objectives, ours.weights)
    assert "zeros=all: their embed_data reads expressed genes alone" in theirs.notes
    assert from_authors(theirs.args, theirs.weights, vocab).tokenizer.zeros == "all"
    assert not [note for note in to_authors(ours.model, ours.tokenizer, ours.objectives, ours.weights).notes if "zeros" in note]


def test_half_precision_is_widened_and_told(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    ours = from_authors(args, {key: tensor.half() for key, tensor in state.items()}, vocab)
    assert {tensor.dtype for tensor in ours.weights.values()} == {torch.float32}
    assert any("float16" in note for note in ours.notes)


def test_all_problems_in_one_message(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    del state["decoder.fc.2.bias"]
    state["surprise.weight"] = torch.zeros(3)
    state["mvc_decoder.W.weight"] = torch.zeros(5, 32)
    state["encoder.enc_norm.bias"] = torch.full((32,), torch.nan)
    state["transformer_encoder.layers.999999999.norm1.weight"] = torch.zeros(32)
    with pytest.raises(InputError) as caught:
        from_authors(args, state, vocab)
    message = str(caught.value)
    for words in (
        "missing: decoder.fc.2.bias",
        "unexpected: surprise.weight (3,)",
        "misshaped: mvc_decoder.W.weight is (5, 32), expected (32, 32)",
        "not finite: encoder.enc_norm.bias",
        "unexpected: transformer_encoder.layers.999999999.norm1.weight",
    ):
        assert words in message


def change(state: State, **tensors: Tensor | None) -> State:
    renamed = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in (state | renamed).items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("a_pretrain", lambda s: change(s, encoder__embedding__weight=None), "missing: encoder.embedding.weight"),
        ("a_pretrain", lambda s: change(s, encoder__embedding__weight=torch.zeros(7, 32)), "203 tokens, .* 7 rows"),
        (
            "a_pretrain",
            lambda s: change(s, encoder__enc_norm__bias=torch.zeros(32, dtype=torch.int64)),
            "not numbers: encoder.enc_norm",
        ),
        (
            "a_pretrain",
            lambda s: {k: t for k, t in s.items() if "transformer" not in k},
            "missing: transformer_encoder.layers.0.self_attn.Wqkv.weight",
        ),
        ("b_integration", lambda s: {k: t for k, t in s.items() if "bns.2" not in k}, "batch_encoder has 3, dsbn 2"),
        (
            "b_integration",
            lambda s: s | {f"bn.{k}": torch.ones(32) for k in ("weight", "bias", "running_mean", "running_var")},
            "both bn and dsbn",
        ),
        (
            "c_annotation",
            lambda s: {k: t for k, t in s.items() if "cls_decoder._decoder.2" not in k},
            "missing: cls_decoder._dec",
        ),
        ("a_pretrain", lambda s: s | {f"module.{k}": t for k, t in s.items()}, "two spellings of the same tensor"),
    ],
)
def test_broken_checkpoints(name: str, broken: Any, words: str) -> None:
    args, state, vocab = read(name)
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
        from_authors(args, broken(state), vocab)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embsize": 64}, "embsize is 64, by the tensors 32"),
        ({"d_hid": 32}, "d_hid is 32, by the tensors 48"),
        ({"nlayers": 12}, "nlayers is 12, by the tensors 2"),
        ({"n_layers_cls": 2}, "n_layers_cls is 2, by the tensors 3"),
        ({"nheads": None}, "nheads=None"),
        ({"nheads": 5}, "nheads=5 for weights that are 32 wide"),
        ({"dropout": 2}, "dropout"),
    ],
)
def test_contradictions_name_both_sides(change: dict[str, Any], words: str) -> None:
    args, state, vocab = read("c_annotation")
    with pytest.raises(InputError, match=words):
        from_authors(args | change, state, vocab)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_emb_style": "category"}, "input_emb_style='category'"),
        ({"input_emb_style": "scaling"}, "input_emb_style='scaling'"),
        ({"cell_emb_style": "avg-pool"}, "cell_emb_style='avg-pool'"),
        ({"cell_emb_style": "w-pool"}, "cell_emb_style='w-pool'"),
        ({"mvc_decoder_style": "concat query"}, "mvc_decoder_style='concat query'"),
        ({"mvc_decoder_style": "sum query"}, "mvc_decoder_style='sum query'"),
        ({"pre_norm": True}, "pre_norm=True"),
        ({"fast_transformer_backend": "linear"}, "fast_transformer_backend='linear'"),
        ({"domain_spec_batchnorm": "do_affine"}, "domain_spec_batchnorm='do_affine'"),
        ({"decoder_activation": "GELU"}, "decoder_activation='GELU'"),
    ],
)
def test_variants_are_refused(pretrained: tuple[dict[str, Any], State, GeneVocab], change: dict[str, Any], words: str) -> None:
    args, state, vocab = pretrained
    with pytest.raises(InputError, match=words):
        from_authors(args | change, state, vocab)


def test_variants_are_seen_in_tensors_and_named_together(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    state = {key: tensor for key, tensor in state.items() if not key.startswith("value_encoder")}
    state["mvc_decoder.fc1.weight"] = torch.zeros(64, 96)
    with pytest.raises(InputError, match="input_emb_style='scaling', mvc_decoder_style='concat query or sum query', pre_norm=True"):
        from_authors(args | {"pre_norm": True}, state, vocab)


def test_detach_and_affine_settings_are_read() -> None:
    args, state, vocab = read("d_perturbation")
    ours = from_authors(args | {"decoder_activation": "ReLU", "decoder_adaptive_bias": True}, state, vocab)
    assert ours.objectives["affine"] == {"kind": "affine", "activation": "relu", "adaptive_bias": True, "zero_probability": False}
    assert ours.tokenizer.values == "raw"
    args, state, vocab = read("a_pretrain")
    assert from_authors(args | {"mvc_decoder_style": "inner product, detach"}, state, vocab).objectives["gepc"]["detach_genes"]


def test_drop_names_heads() -> None:
    args, state, vocab = read("b_integration")
    ours = from_authors(args, state, vocab, drop=["cls", "gep"])
    assert set(ours.objectives) == {"gepc", "dar"}
    assert not [key for key in ours.weights if key.startswith(("objectives.cls", "objectives.gep."))]
    with pytest.raises(InputError, match=r"'gepp'.*\n.*cls, dar, gep, gepc.*\n.*did you mean gep"):
        from_authors(args, state, vocab, drop=["gepp"])


def test_drop_names_a_module_that_we_do_not_know(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    state["study_head.weight"] = torch.zeros(9, 32)
    assert any("study_head" in note for note in from_authors(args, state, vocab, drop=["study_head"]).notes)
    with pytest.raises(InputError, match="'encoder'"):
        from_authors(args, state, vocab, drop=["encoder"])


@pytest.mark.parametrize(
    ("name", "settings", "value", "words"),
    [
        ("a_pretrain", {}, -2, "as in pretraining"),
        ("a_pretrain", {"pad_value": 0}, 0, "as in pretraining"),
        ("a_pretrain", {"dataset_name": "PBMC_10K"}, 0, "fine-tuning, for there are dataset_name in args.json"),
        ("a_pretrain", {"dataset_name": "PBMC_10K", "cls_value": -2}, -2, "args.json says so"),
        ("b_integration", {}, 0, "fine-tuning, for there are"),
        ("c_annotation", {}, 0, "classes of cells"),
        ("c_annotation", {"USE_CLS": True}, -2, "as in pretraining"),
        ("d_perturbation", {}, 0, "an affine decoder"),
        ("e_multiomic", {}, 0, "modalities"),
    ],
)
def test_value_at_cls(name: str, settings: dict[str, Any], value: float, words: str) -> None:
    args, state, vocab = read(name)
    ours = from_authors(args | settings, state, vocab)
    assert ours.tokenizer.cls_value == value
    assert [note for note in ours.notes if note.startswith(f"the value at <cls> is {value}") and words in note]


def test_fine_tuned_model_without_its_heads_was_still_fine_tuned() -> None:
    args, state, vocab = read("c_annotation")
    assert from_authors(args, state, vocab, drop=["cls"]).tokenizer.cls_value == 0


def test_one_class_is_no_fine_tuning(pretrained: tuple[dict[str, Any], State, GeneVocab]) -> None:
    args, state, vocab = pretrained
    classifier = {key: tensor for key, tensor in read("c_annotation")[1].items() if key.startswith("cls_decoder.")}
    classifier |= {key: tensor[:1] for key, tensor in classifier.items() if ".out_layer." in key}
    ours = from_authors(args, state | classifier, vocab)
    assert "cls" in ours.objectives
    assert ours.tokenizer.cls_value == -2


def test_value_at_cls_by_choice(tmp_path: Path) -> None:
    assert main(["convert", str(GOLDEN / "c_annotation"), "--out", str(tmp_path / "ours"), "--cls_value", "-2"]) == 0
    ours = ScGPT.from_pretrained(tmp_path / "ours")
    assert ours.tokenizer.cls_value == -2
    notes = ours.config.provenance["notes"]
    assert isinstance(notes, list)
    assert notes[-1] == "the value at <cls> was set to -2 on request"
    assert main(["convert", str(tmp_path / "ours"), "--to_authors", "--out", str(tmp_path / "theirs")]) == 0
    assert ScGPT.from_pretrained(tmp_path / "theirs").tokenizer.cls_value == -2


def config(objectives: dict[str, dict[str, Any]], tokenizer: dict[str, Any], **model: Any) -> ModelFolderConfig:
    sizes = {"vocab_size": 12, "width": 8, "n_heads": 2, "n_layers": 1, "ff_width": 8, "project_asked": False}
    return ModelFolderConfig.model_validate({"model": sizes | model, "tokenizer": tokenizer, "objectives": objectives})


GEP, GEPC, AFFINE = {"kind": "gep"}, {"kind": "gepc"}, {"kind": "affine"}
FLAGS = {"n_flags": 3, "generative": False}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (config({}, {}, dose=True), "dose"),
        (config({}, {}, project_asked=True), "project_asked=True"),
        (config({}, {"values": "raw"}, n_flags=2, generative=False), "n_flags=2"),
        (config({}, {"values": "raw"}, **FLAGS, input_norm="batch"), "flags beside batches"),
        (config({"affine": AFFINE}, {}, generative=False), "flags and the affine objective"),
        (config({"gep": GEP}, {"values": "raw"}, **FLAGS), "flags and the affine objective"),
        (config({}, {}, n_modalities=3), "modalities in a generative model"),
        (config({"gepc": GEPC}, {}, n_modalities=3, generative=False), "context_in_query"),
        (config({"gep": {"kind": "gep", "loss": "ce"}}, {}), "loss='ce'"),
        (config({"gep": GEP | {"zero_probability": True}, "gepc": GEPC}, {}), "'gep': True, 'gepc': False}: theirs is one switch"),
        (config({"dar": {"kind": "dar", "n_batches": 2, "n_layers": 2}}, {}), "dar with other than 3 layers"),
        (config({"coarse": {"kind": "cls", "n_classes": 2}}, {}), "'coarse' is a second cls"),
        (config({}, {"n_bins": 21}), "n_bins=21"),
        (config({}, {"values": "raw"}), "values='raw'"),
    ],
)
def test_what_theirs_cannot_express(made: ModelFolderConfig, words: str) -> None:
    objectives = {name: settings.model_dump() for name, settings in made.objectives.items()}
    with pytest.raises(InputError, match=words):
        to_authors(made.model, made.tokenizer, objectives, {})


def test_other_dropout_of_attention_is_told() -> None:
    made = config({}, {}, generative=False, attention_dropout=0.1)
    model = ScGPT(made, GeneVocab([f"G{i}" for i in range(9)]).with_specials())
    said = "dropout 0.2, which acts on attention too; here that is 0.1 (matters in training only)"
    assert [note for note in to_authors(made.model, made.tokenizer, {}, model.state_dict()).notes if said in note]
    same = made.model.with_(attention_dropout=0.2)
    assert not [note for note in to_authors(same, made.tokenizer, {}, model.state_dict()).notes if "dropout" in note]


def test_dropping_asked_makes_it_expressible(tmp_path: Path) -> None:
    made = config({"gep": GEP, "ecs": {"kind": "ecs"}}, {}, project_asked=True)
    model = ScGPT(made, GeneVocab([f"G{i}" for i in range(9)]).with_specials())
    notes = model.save_for_authors(tmp_path / "theirs", drop=["asked"])
    assert any("ecs has no weights" in note for note in notes)
    back = ScGPT.from_pretrained(tmp_path / "theirs")
    assert not back.config.model.generative
    assert same({k: t for k, t in model.state_dict().items() if k != "encoder.asked"}, dict(back.state_dict()))


# --- an independent forward pass over their names, written from their documentation in REFERENCE style --------------------------------


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def their_cell(w: State, genes: Tensor, values: Tensor, n_heads: int, n_layers: int) -> Tensor:
    """Embedding of one cell as `embed_data` computes it, before the division by its length."""
    x = norm(w, "encoder.enc_norm", w["encoder.embedding.weight"][genes])
    hidden = torch.relu(linear(w, "value_encoder.linear1", values.clamp(max=512)[:, None]))
    x = x + norm(w, "value_encoder.norm", linear(w, "value_encoder.linear2", hidden))
    for n in range(n_layers):
        layer = f"transformer_encoder.layers.{n}"
        projected = F.linear(x, w[f"{layer}.self_attn.in_proj_weight"], w[f"{layer}.self_attn.in_proj_bias"])
        q, k, v = (part.view(len(x), n_heads, -1).movedim(1, 0) for part in projected.chunk(3, -1))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = norm(w, f"{layer}.norm1", x + linear(w, f"{layer}.self_attn.out_proj", (weights @ v).movedim(0, 1).flatten(1)))
        x = norm(w, f"{layer}.norm2", x + linear(w, f"{layer}.linear2", torch.relu(linear(w, f"{layer}.linear1", x))))
    return x[0]


def test_exported_embedding_is_the_same(tmp_path: Path, tiny_model: ScGPT) -> None:
    tiny_model.save_for_authors(tmp_path / "theirs", spelling="in_proj", drop=["asked"])
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"args.json", "vocab.json", "best_model.pt"}
    state = torch.load(tmp_path / "theirs/best_model.pt", weights_only=True)
    assert isinstance(state, (dict, OrderedDict))
    args = json.loads((tmp_path / "theirs/args.json").read_text())
    assert (args["embsize"], args["nlayers"], args["pad_value"]) == (32, 2, -2)
    generator = torch.Generator().manual_seed(0)
    genes = torch.cat((torch.tensor([tiny_model.vocab.cls_id]), torch.randperm(300, generator=generator)[:70]))
    values = torch.cat((torch.tensor([-2.0]), torch.randint(1, 51, (70,), generator=generator).float()))
    tokens = TokenBatch(genes, values, None, None, torch.tensor([0, 71]), torch.tensor([71]), None, None, {}, None)
    with torch.no_grad():
        theirs = their_cell(state, genes, values, args["nheads"], args["nlayers"])
        for model in (tiny_model, ScGPT.from_pretrained(tmp_path / "theirs")):
            torch.testing.assert_close(model.encode(tokens, "cell").cell[0], theirs, rtol=0, atol=2e-6)
