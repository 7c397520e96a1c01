"""The model as a folder: saved, loaded strictly, called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file

from annformer.errors import InputError
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tokens import TokenBatch
from annformer.vocab import GeneVocab

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def model(tiny_vocab: GeneVocab) -> ScGPT:
    """A small model with every kind of objective."""
    torch.manual_seed(3)
    config = ModelFolderConfig.model_validate(
        {
            "model": {"vocab_size": len(tiny_vocab), "width": 16, "n_heads": 2, "n_layers": 2, "ff_width": 24},
            "objectives": {
                "gep": {"kind": "gep", "cell_prompt": True},
                "gepc": {"kind": "gepc"},
                "cls": {"kind": "cls", "n_classes": 3},
                "ecs": {"kind": "ecs"},
                "cce": {"kind": "cce"},
            },
            "provenance": {"name": "small", "seed": 3},
        }
    )
    return ScGPT(config, tiny_vocab).eval()


@pytest.fixture
def folder(model: ScGPT, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def some_tokens(vocab: GeneVocab) -> TokenBatch:
    lengths, n_visible = torch.tensor([9, 5, 12]), torch.tensor([6, 3, 12])
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    rng = np.random.default_rng(0)
    genes = np.concatenate([np.append(vocab.cls_id, rng.choice(300, n - 1, replace=False)) for n in lengths.tolist()])
    position = torch.arange(26) - offsets[:-1].repeat_interleave(lengths)
    asked = position >= n_visible.repeat_interleave(lengths)
    values = torch.from_numpy(rng.integers(1, 51, 26).astype(np.float32))
    values[offsets[:-1]] = -2
    return TokenBatch(
        gene_ids=torch.from_numpy(genes),
        values=torch.where(asked, 0, values),
        flags=None,
        dose=None,
        offsets=offsets,
        n_visible=n_visible,
        targets=torch.where(asked, values, torch.nan),
        modality=None,
        labels={"cell_type": torch.tensor([0, 2, 1])},
        cell=None,
    ).check()


def test_saved_and_loaded(model: ScGPT, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "vocab.json"]
    again = ScGPT.from_pretrained(folder)
    assert again.config == model.config
    assert again.vocab == model.vocab
    assert again.name == "small"
    assert not again.training
    assert again.fingerprint == model.fingerprint
    tokens = some_tokens(model.vocab)
    assert torch.equal(again.encode(tokens).states, model.encode(tokens).states)
    assert all(key.startswith(("encoder.", "objectives.")) for key in model.state_dict())


def test_fingerprint_is_of_weights_settings_and_genes(model: ScGPT) -> None:
    before = model.fingerprint
    renamed = ScGPT(model.config.with_(provenance={"name": "other"}), model.vocab)
    renamed.load_state_dict(model.state_dict())
    assert renamed.fingerprint == before
    genes = list(model.vocab.tokens)
    genes[0], genes[1] = genes[1], genes[0]
    swapped = ScGPT(model.config, GeneVocab(genes))
    swapped.load_state_dict(model.state_dict())
    assert swapped.fingerprint != before
    model.encoder.layers[0].ff_in.bias.data[0] += 1e-6
    assert model.fingerprint != before


def with_untrained(model: ScGPT, *genes: str) -> ScGPT:
    """The same weights, some genes marked as untrained."""
    other = ScGPT(model.config, GeneVocab(model.vocab.tokens, genes))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_untrained_genes_are_saved_and_loaded(model: ScGPT, tmp_path: Path) -> None:
    first, last = model.vocab.genes[0], model.vocab.genes[-1]
    marked = with_untrained(model, last, first)
    assert marked.config.untrained_genes == (first, last)
    assert marked.fingerprint != model.fingerprint
    marked.save_pretrained(tmp_path / "model")
    again = ScGPT.from_pretrained(tmp_path / "model")
    assert again.vocab == marked.vocab
    assert again.fingerprint == marked.fingerprint
    assert GeneVocab.from_json(tmp_path / "model/vocab.json") == model.vocab
    assert ScGPT(again.config, again.vocab.all_trained()).config == model.config
    assert "2 of them untrained" in (tmp_path / "model/README.md").read_text()


def test_folders_from_before_untrained_genes_load(model: ScGPT, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["untrained_genes"]
    (folder / "config.json").write_text(json.dumps(config))
    assert ScGPT.from_pretrained(folder).vocab == model.vocab
    change_config(folder, untrained_genes=["NOT-A-GENE"])
    with pytest.raises(InputError, match="no genes of the vocabulary: NOT-A-GENE"):
        ScGPT.from_pretrained(folder)


def test_an_embedding_does_not_depend_on_untrained_genes(tiny_model: ScGPT, tiny_adata: Callable[..., AnnData]) -> None:
    from annformer.tasks.embedding import embed

    genes = tiny_model.vocab.genes[::7]
    model, cells = with_untrained(tiny_model, *genes), tiny_adata()
    changed, without = cells.copy(), cells[:, ~cells.var_names.isin(genes)].copy()
    counts = cells.X.toarray()
    counts[:, cells.var_names.isin(genes)] = np.random.default_rng(1).integers(0, 90, (cells.n_obs, len(genes)))
    changed.X = counts
    for adata in (cells, changed, without):
        embed(adata, model, progress=False)
    np.testing.assert_array_equal(cells.obsm["X_annformer"], changed.obsm["X_annformer"])
    np.testing.assert_array_equal(cells.obsm["X_annformer"], without.obsm["X_annformer"])
    assert changed.uns["annformer"]["X_annformer"]["genes"]["n_untrained"] == len(genes)
    embed(changed, tiny_model, progress=False)
    assert not np.allclose(cells.obsm["X_annformer"], changed.obsm["X_annformer"], atol=1e-3)


def test_the_authors_code_is_said_to_read_untrained_genes(tiny_model: ScGPT, tmp_path: Path) -> None:
    assert not any("untrained" in note for note in tiny_model.save_for_authors(tmp_path / "a", drop=["asked"]))
    notes = with_untrained(tiny_model, *tiny_model.vocab.genes[:3]).save_for_authors(tmp_path / "b", drop=["asked"])
    assert "3 genes of the vocabulary are untrained: annformer does not read them, their code will" in notes[-1]


def test_losses_have_names_and_the_asked_tokens_count(model: ScGPT) -> None:
    losses = model.losses(some_tokens(model.vocab))
    assert set(losses) == {"gep", "gep_cell_prompt", "gepc", "cls", "ecs", "cce"}
    assert int(losses["gep"].n) == 5
    assert all(bool(torch.isfinite(loss.mean)) for loss in losses.values())


def test_without_targets_only_the_cell_is_encoded(model: ScGPT, folder: Path) -> None:
    classifier = ScGPT.from_pretrained(folder, drop=["gep", "gepc", "cce"])
    losses = classifier.losses(some_tokens(model.vocab)._replace(targets=None))
    assert set(losses) == {"cls", "ecs"}
    torch.testing.assert_close(losses["cls"].mean, model.losses(some_tokens(model.vocab))["cls"].mean)


def test_dropped_heads_are_gone(folder: Path) -> None:
    model = ScGPT.from_pretrained(folder, drop=["cls"])
    assert "cls" not in model.config.objectives
    assert not [key for key in model.state_dict() if "objectives.cls" in key]
    with pytest.raises(InputError, match=r"'clss'.*\n.*\n.*did you mean cls"):
        ScGPT.from_pretrained(folder, drop=["clss"])


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_everything_wrong_with_the_tensors_in_one_message(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["encoder.layers.1.qkv.bias"]
        weights["encoder.layers.7.qkv.bias"] = torch.zeros(2)
        weights["encoder.gene_norm.bias"] = torch.zeros(5)
        weights["encoder.gene_norm.weight"] = torch.zeros(16, dtype=torch.float64)
        weights["encoder.asked"][3] = torch.nan

    change_weights(folder, change)
    with pytest.raises(InputError) as caught:
        ScGPT.from_pretrained(folder)
    for words in (
        "missing: encoder.layers.1.qkv.bias",
        "unexpected: encoder.layers.7.qkv.bias (2,)",
        "misshaped: encoder.gene_norm.bias is torch.float32 (5,), expected torch.float32 (16,)",
        "misshaped: encoder.gene_norm.weight is torch.float64 (16,)",
        "not finite: encoder.asked",
    ):
        assert words in str(caught.value)


def change_part(folder: Path, part: str, drop: str = "", **changes: object) -> None:
    """Change settings of one part of `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    config[part] = {name: value for name, value in (config[part] | changes).items() if name != drop}
    (folder / "config.json").write_text(json.dumps(config))


def test_missing_settings_are_listed_and_never_assumed(folder: Path) -> None:
    change_part(folder, "model", drop="project_asked")
    config = json.loads((folder / "config.json").read_text())
    del config["tokenizer"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"lacks model.project_asked, tokenizer.n_bins, .*tokenizer.cls_value, "):
        ScGPT.from_pretrained(folder)


def test_folders_from_before_there_were_zeros_have_none(folder: Path) -> None:
    change_part(folder, "tokenizer", drop="zeros")
    assert ScGPT.from_pretrained(folder).tokenizer.zeros == 0
    change_part(folder, "tokenizer", drop="seed")
    with pytest.raises(InputError, match=r"lacks tokenizer.seed\b"):
        ScGPT.from_pretrained(folder)


def test_zeros_are_part_of_a_model(model: ScGPT, tmp_path: Path) -> None:
    config = model.config.with_(tokenizer=model.tokenizer.with_(zeros="all").model_dump())
    ScGPT(config, model.vocab).save_pretrained(tmp_path / "zeros")
    assert ScGPT.from_pretrained(tmp_path / "zeros").tokenizer.zeros == "all"


@pytest.mark.parametrize("size", [25, 10_000, 10**13, 10**30])
@pytest.mark.parametrize("name", ["ff_width", "n_layers"])
def test_sizes_are_held_against_the_file_before_they_are_built(folder: Path, name: str, size: int) -> None:
    change_part(folder, "model", **{name: size})
    with pytest.raises(InputError, match=rf"model.safetensors does not fit:(.|\n)*({name} is {size}|misshaped|missing)"):
        ScGPT.from_pretrained(folder)


def test_sizes_of_heads_are_held_against_the_file(folder: Path) -> None:
    change_part(folder, "objectives", cls={"kind": "cls", "n_classes": 10**12, "n_layers": 10**9})
    with pytest.raises(InputError, match=r"objectives.cls.n_classes is 1000000000000, (.|\n)*objectives.cls.n_layers is 1000000000"):
        ScGPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("network", "label"),
    [
        ({"input_norm": "domain", "n_batches": 2}, "batch label for every cell"),
        ({"batch_context": True, "n_batches": 2}, "batch label for every cell"),
        ({"n_modalities": 3}, "modality for every gene"),
    ],
)
def test_what_genes_and_values_cannot_feed_is_refused(model: ScGPT, network: dict[str, object], label: str) -> None:
    model.require_no_batch()
    config = model.config.with_(model=model.config.model.with_(**network).model_dump(), objectives={})
    with pytest.raises(InputError, match=f"fine-tuned with a {label}"):
        ScGPT(config, model.vocab).require_no_batch()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: change_config(f, colour="blue"), r"config.json: no valid ModelFolderConfig.*\n.*colour"),
        (lambda f: change_config(f, format=2), r"has format 2.*\n.*\n.*install the newer annformer"),
        (lambda f: (f / "config.json").write_text("{}"), r"has format None.*\n.*format 1"),
        (lambda f: change_config(f, objectives={"gep": {"kind": "wave"}}), "objectives.gep"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not a model"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "vocab.json").write_text('{"A": 0, "B": 2}'), "vocab.json"),
        (lambda f: GeneVocab(["A", "B"]).to_json(f / "vocab.json"), "2 tokens"),
    ],
)
def test_spoilt_folders(folder: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=words):
        ScGPT.from_pretrained(folder)


def test_authors_folder_is_loaded_as_it_is() -> None:
    model = ScGPT.from_pretrained(GOLDEN / "b_integration", drop=["cls"])
    assert model.name == "b_integration"
    assert set(model.objectives) == {"gep", "gepc", "dar"}
    assert model.config.provenance["notes"]


def test_converted_models_are_saved_in_our_format(tmp_path: Path) -> None:
    theirs = ScGPT.from_pretrained(GOLDEN / "b_integration")
    theirs.save_pretrained(tmp_path / "ours")
    ours = ScGPT.from_pretrained(tmp_path / "ours")
    assert ours.config == theirs.config
    assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("scgpt-humn", r"there is no model 'scgpt-humn'.*\n.*\n.*did you mean scgpt-human"),
        ("no such folder", r"there is no model.*\n.*one of annformer-base, scgpt-human.*\n.*check the path"),
        ("annformer-bose", r"there is no model 'annformer-bose'.*\n.*\n.*did you mean annformer-base"),
        (__file__, "is a file"),
        (Path(__file__).parent, "lacks config.json, vocab.json, model.safetensors"),
        (Path("no/such"), "there is no model 'no/such'"),
    ],
)
def test_no_such_model(source: str | Path, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ScGPT.from_pretrained(source)


def test_card_says_what_it_is(model: ScGPT, folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "# small" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert "- seed: 3" in card
    model.save_pretrained(tmp_path / "model", card="mine")
    assert (folder / "README.md").read_text() == "mine"


def test_vocabulary_must_fit(model: ScGPT) -> None:
    with pytest.raises(InputError, match="2 tokens"):
        ScGPT(model.config, GeneVocab(["A", "B"]))
