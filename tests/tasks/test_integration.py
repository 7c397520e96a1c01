"""BatchIntegrator: what a fit leaves behind, new cells, files, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import annformer as af
from annformer.errors import AnnformerWarning, InputError
from annformer.model.config import ModelConfig
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tasks._integration_recipe import IntegrationRecipe
from annformer.tasks.integration import BatchIntegrator

QUICK = {
    "n_genes": 100,
    "least_steps": 80,
    "anchor": {"n_components": 12, "n_neighbours": 10},
    "gep": {"kind": "gep", "weight": 0.01},
    "gepc": {"kind": "gepc", "weight": 0.01},
    "dar_weight": 0.1,
    "train": {
        "epochs": 15,
        "tokens_per_step": 2000,
        "tokens_per_forward": 4000,
        "max_length": 40,
        "validations": 3,
        "patience": 3,
        "mode": "hide",
        "asked_shares": [0.4],
        "hold_out": {"share": 0.1},
    },
}
SIZES = {"width": 32, "n_heads": 4, "n_layers": 2, "ff_width": 32}
RECIPE = IntegrationRecipe.read(QUICK, where="test")


def shifted(adata):
    """Cells whose second batch has counts of a third of the genes that are not the cells'."""
    dense = adata.X.toarray()
    genes = np.argsort(adata.var_names.to_numpy().astype(str)) % 3 == 0
    rows = (adata.obs["batch"] == "b1").to_numpy()
    dense[np.ix_(rows, genes)] += np.random.default_rng(0).poisson(3, size=(rows.sum(), genes.sum()))
    adata.X = type(adata.X)(dense)
    return adata


@pytest.fixture(scope="module")
def cells(tiny_adata):
    return shifted(tiny_adata(240))


@pytest.fixture(scope="module")
def model(tiny_vocab):
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ModelConfig(vocab_size=len(tiny_vocab), **SIZES)
        return ScGPT(ModelFolderConfig(model=network), tiny_vocab).eval()


@pytest.fixture(scope="module")
def fitted(model, cells):
    return BatchIntegrator(model, batch_key="batch", recipe=RECIPE, threads=1).fit(cells)


@pytest.fixture(scope="module")
def embedded(fitted, cells):
    return fitted.transform(cells, copy=True)


def separation(embedding, labels) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(embedding, labels))


def test_types_lie_apart_and_batches_do_not(embedded, cells):
    """Against principal components of the same cells, whose batches lie apart by construction."""
    from annformer.baselines import pca_embedding
    from annformer.baselines.expression import log_normalised

    ours, floor = embedded.obsm["X_annformer"], pca_embedding(log_normalised(cells.X), n_components=12)
    assert separation(floor, cells.obs["batch"]) > 0.2
    assert abs(separation(ours, cells.obs["batch"])) < 0.1
    found = {
        name: (separation(e, cells.obs["batch"]), separation(e, cells.obs["cell_type"])) for name, e in (("ours", ours), ("pca", floor))
    }
    assert found["ours"][1] > found["pca"][1] + 0.1, found


def test_what_is_written(embedded, cells, fitted):
    embedding = embedded.obsm["X_annformer"]
    assert embedding.shape == (240, 12) and embedding.dtype == np.float32
    assert np.isfinite(embedding).all()
    assert embedded.uns["annformer"]["X_annformer"]["batches"] == ["b0", "b1"]
    assert "X_annformer" not in cells.obsm
    assert {"train/anchor", "validation/anchor", "train/gep", "train/gepc", "train/dar"} <= set(fitted.history_)
    held_back = fitted.history_["validation/anchor"].dropna()
    assert held_back.min() < 0.5 * held_back.iloc[0]


def test_the_same_seed_gives_the_same_embedding_and_another_one_another(model, cells, embedded):
    again = BatchIntegrator(model, batch_key="batch", recipe=RECIPE, threads=1).fit(cells).transform(cells, copy=True)
    assert np.array_equal(again.obsm["X_annformer"], embedded.obsm["X_annformer"])
    other = BatchIntegrator(model, batch_key="batch", recipe=RECIPE, threads=1, seed=1).fit(cells).transform(cells, copy=True)
    assert not np.allclose(other.obsm["X_annformer"], embedded.obsm["X_annformer"], atol=1e-3)


def test_pretrained_weights_are_taken_and_from_scratch_they_are_not(model, cells):
    recipe = RECIPE.with_(train={**QUICK["train"], "epochs": 0.2, "learning_rate": 1e-9})
    begun = BatchIntegrator(model, batch_key="batch", recipe=recipe, threads=1).fit(cells).model_
    scratch = BatchIntegrator(model, batch_key="batch", recipe=recipe, threads=1, pretrained=False).fit(cells).model_
    mine = model.encoder.layers[0].qkv.weight
    assert np.allclose(begun.encoder.layers[0].qkv.weight.detach(), mine.detach(), atol=1e-6)
    assert not np.allclose(scratch.encoder.layers[0].qkv.weight.detach(), mine.detach(), atol=1e-3)


def test_new_cells_of_known_batches(fitted, embedded, tiny_adata, cells):
    """Other cells of the same types lie nearest to the middle of their type, those of the second batch alone as well."""
    half = cells[::2].copy()
    rest = cells[1::2].copy()
    integrator = BatchIntegrator(fitted.model, batch_key="batch", recipe=RECIPE, threads=1).fit(half)
    integrator.transform(half)
    kinds = cells.obs["cell_type"].cat.categories
    centres = np.stack([half.obsm["X_annformer"][(half.obs["cell_type"] == kind).to_numpy()].mean(0) for kind in kinds])
    for new in (rest, rest[rest.obs["batch"] == "b1"].copy()):
        integrator.transform(new)
        nearest = kinds[np.linalg.norm(new.obsm["X_annformer"][:, None] - centres, axis=2).argmin(1)]
        assert (nearest == new.obs["cell_type"]).mean() > 0.9


def test_normalisation_by_batch_knows_the_batches_of_few_cells(model, cells):
    """The second batch alone is the first that its source counts, and not the first of the model."""
    integrator = BatchIntegrator(model, batch_key="batch", recipe=RECIPE.with_(dsbn=True), threads=1).fit(cells)
    whole = integrator.transform(cells, copy=True).obsm["X_annformer"]
    second = (cells.obs["batch"] == "b1").to_numpy()
    alone = integrator.transform(cells[second].copy(), copy=True).obsm["X_annformer"]
    assert np.allclose(alone, whole[second], atol=1e-4)


def test_cells_cut_to_the_chosen_genes_are_refused(fitted, cells):
    """Their library size would be another."""
    with pytest.raises(InputError, match="relative to their sum"):
        fitted.transform(cells[:, list(fitted.genes_)].copy())


def test_cells_cut_to_the_chosen_genes_are_refused_where_a_profile_reads_them(tiny_vocab, cells):
    with_profile = ScGPT(ModelFolderConfig(model=ModelConfig(vocab_size=len(tiny_vocab), **SIZES, profile=True)), tiny_vocab).eval()
    recipe = RECIPE.with_(view=False, least_steps=0, train=RECIPE.train.with_(epochs=0.2, validations=1).model_dump())
    fitted = BatchIntegrator(with_profile, batch_key="batch", recipe=recipe, threads=1).fit(cells)
    assert fitted.model_.encoder.profile is not None
    with pytest.raises(InputError, match="relative to their sum"):
        fitted.transform(cells[:, list(fitted.genes_)].copy())
    recipe = recipe.with_(profile=False)
    without = BatchIntegrator(with_profile, batch_key="batch", recipe=recipe, threads=1).fit(cells)
    assert without.model_.encoder.profile is None


def test_a_fine_tuned_model_is_no_beginning(fitted, cells):
    with pytest.raises(InputError, match="fine-tuned already"):
        BatchIntegrator(fitted.model_, batch_key="batch").fit(cells)


def test_only_devices_that_training_knows(model, cells):
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        BatchIntegrator(model, batch_key="batch", recipe=RECIPE, device="cuda:1").fit(cells)


def test_a_cell_is_placed_as_among_the_others_when_it_comes_alone(fitted, embedded, cells):
    few = cells[[3, 100, 7]].copy()
    fitted.transform(few)
    assert np.allclose(few.obsm["X_annformer"], embedded.obsm["X_annformer"][[3, 100, 7]], atol=1e-5)


def test_saved_and_loaded(fitted, embedded, cells, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = BatchIntegrator.load(tmp_path / "model", threads=1)
    again = loaded.transform(cells, copy=True)
    assert np.allclose(again.obsm["X_annformer"], embedded.obsm["X_annformer"], atol=1e-6)
    mine, theirs = (one.corrected(cells, copy=True).obsm["annformer_corrected"] for one in (fitted, loaded))
    assert np.allclose(mine, theirs, atol=1e-5)
    af.ScGPT.from_pretrained(tmp_path / "model")
    fitted.save(tmp_path / "model")  # in its own place


def test_a_model_of_another_kind_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="pretrained one"):
        BatchIntegrator.load(tmp_path / "model")


def test_corrected_genes_are_named_as_in_the_data(fitted, cells):
    renamed = cells[:10].copy()
    renamed.var_names = [str(name).lower() for name in renamed.var_names]
    table = fitted.corrected(renamed, copy=True).obsm["annformer_corrected"]
    assert set(table.columns) <= set(renamed.var_names)
    assert [str(name).upper() for name in table.columns] == [gene.upper() for gene in fitted.genes_]


def test_corrected_expression_has_the_types_and_not_the_batches(fitted, cells):
    """In units of log-normalised expression; as another batch it is that batch's."""
    table = fitted.corrected(cells, copy=True).obsm["annformer_corrected"]
    assert isinstance(table, pd.DataFrame) and list(table.columns) == list(fitted.genes_) and (table.to_numpy() >= 0).all()
    from annformer.baselines.expression import log_normalised

    observed = pd.DataFrame(log_normalised(cells.X).toarray(), index=cells.obs_names, columns=cells.var_names)[list(fitted.genes_)]
    of_batch = [(cells.obs["batch"] == name).to_numpy() for name in ("b0", "b1")]

    def gap(values) -> float:
        means = [values.to_numpy()[rows].mean(0) for rows in of_batch]
        return float(np.abs(means[0] - means[1]).mean())

    assert gap(table) < 0.5 * gap(observed)
    assert np.corrcoef(table.mean(), observed.mean())[0, 1] > 0.9
    as_b1 = fitted.corrected(cells, batch="b1", copy=True).obsm["annformer_corrected"]
    assert np.abs(as_b1.to_numpy() - table.to_numpy()).mean() > 0.01
    with pytest.raises(InputError, match="'b7'"):
        fitted.corrected(cells, batch="b7")


def test_a_batch_that_was_not_fitted_is_refused(fitted, tiny_adata):
    new = tiny_adata(60)
    new.obs["batch"] = new.obs["batch"].astype(str).replace("b1", "b9")
    with pytest.raises(InputError, match=r"not fitted: 'b9'[\s\S]*'b0', 'b1'"):
        fitted.transform(new)


def test_cells_without_the_genes_are_refused(fitted, cells):
    kept = [name for name in cells.var_names if name not in fitted.genes_[10:]]
    with pytest.raises(InputError, match=r"has 10 of the 100 genes that the model was fitted on[\s\S]*at least 50 of them"):
        fitted.transform(cells[:, kept].copy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda obs: obs.rename(columns={"batch": "donor"}), "give batch_key='donor'"),
        (lambda obs: obs.assign(donors=[None] * 3 + ["a", "b"] * 118 + ["a"]), "a batch for every cell"),
        (lambda obs: obs.assign(donors=["", "  ", "\t"] + ["a", "b"] * 118 + ["a"]), "no value in 3 of 240 cells (the first: 'cell0')"),
    ],
)
def test_batches_that_are_not_there_are_called_by_their_option(model, cells, change, words):
    other = cells.copy()
    other.obs = change(other.obs)
    with pytest.raises(InputError) as refused:
        BatchIntegrator(model, batch_key="donors", recipe=RECIPE).fit(other)
    assert words in str(refused.value)


def test_not_fitted(cells):
    with pytest.raises(InputError, match="call fit"):
        BatchIntegrator(batch_key="batch").transform(cells)


def test_a_stopped_fit_ends_as_an_unbroken_one_and_another_is_refused(model, cells, embedded, tmp_path, monkeypatch):
    from annformer.train import fit as fitting

    class Killed(Exception):
        pass

    validate = fitting._Keeper._validate

    def killed(self, trainer, plan):
        validate(self, trainer, plan)
        if trainer.global_step > 40:
            raise Killed

    config = RECIPE.with_(train=RECIPE.train.with_(checkpoint_steps=7).model_dump())
    with monkeypatch.context() as patch:
        patch.setattr(fitting._Keeper, "_validate", killed)
        with pytest.raises(Killed):
            BatchIntegrator(model, batch_key="batch", recipe=config, threads=1).fit(cells, folder=tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    again = BatchIntegrator(model, batch_key="batch", recipe=config, threads=1).fit(cells, folder=tmp_path / "run")
    assert np.array_equal(again.transform(cells, copy=True).obsm["X_annformer"], embedded.obsm["X_annformer"])
    for other in ({"seed": 3}, {"pretrained": False}):
        with pytest.raises(InputError, match="other cells"):
            BatchIntegrator(model, batch_key="batch", recipe=config, threads=1, **other).fit(cells, folder=tmp_path / "run")


def test_a_start_that_fails_leaves_the_folder_as_it_was(model, cells, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    for name in ("mine", "new"):
        with pytest.raises(InputError, match="threads is -1"):
            BatchIntegrator(model, batch_key="batch", recipe=RECIPE, threads=-1).fit(cells, folder=tmp_path / name)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert not (tmp_path / "new").exists()
    again = BatchIntegrator(model, batch_key="batch", recipe=RECIPE, threads=-1, seed=3)  # other work finds nothing in its way
    with pytest.raises(InputError, match="threads is -1"):
        again.fit(cells, folder=tmp_path / "mine")


def test_stopped_without_a_folder_it_does_not_say_that_something_is_kept(model, cells, monkeypatch):
    from annformer.train import fit as fitting

    monkeypatch.setattr(fitting._Keeper, "_validate", lambda _self, _trainer, plan: setattr(plan, "wants_to_stop", True))
    with pytest.raises(fitting.RunStopped, match="nothing of this fine-tuning is kept"):
        BatchIntegrator(model, batch_key="batch", recipe=RECIPE, threads=1).fit(cells)


def test_what_it_will_take_is_said_beforehand(model, cells, caplog):
    import re

    longer = RECIPE.with_(least_steps=150, train=RECIPE.train.with_(epochs=30, patience=None).model_dump())
    with caplog.at_level("INFO", logger="annformer"):
        BatchIntegrator(model, batch_key="batch", recipe=longer, threads=1).fit(cells)
    said = next(record.getMessage() for record in caplog.records if "GB of memory" in record.getMessage())
    assert re.match(r"about [\d.]+ (s|min) for 150 steps and the embedding, \d", said), said


def test_what_a_recipe_leaves_open_is_as_in_the_one_that_ships(tmp_path):
    shipped = IntegrationRecipe.named("integrate")
    (tmp_path / "mine.yaml").write_text("dsbn: true\ntrain: {epochs: 3}\ngepc: null\n")
    mine = IntegrationRecipe.named(str(tmp_path / "mine.yaml"))
    assert (mine.dsbn, mine.train.epochs, mine.gepc) == (True, 3, None)
    assert mine.train == shipped.train.with_(epochs=3)
    assert mine.with_(dsbn=False, train=shipped.train.model_dump(), gepc=shipped.gepc.model_dump()) == shipped


@pytest.mark.parametrize("name", IntegrationRecipe.shipped)
def test_recipes_that_ship_are_read(name):
    recipe = IntegrationRecipe.named(name)
    assert recipe.objectives(3)["dar"]["n_batches"] == 3


def test_the_recipe_of_the_original_has_its_numbers():
    """Of examples/finetune_integration.py and the tutorial."""
    original = IntegrationRecipe.named("integrate-original").model_dump()
    theirs = {
        "n_genes": 1200,
        "zeros": "all",
        "max_length": 1201,
        "dropout": 0.2,
        "attention_dropout": 0.2,
        "dsbn": True,
        "ecs_weight": 10,
        "ecs_threshold": 0.8,
        "dar_weight": 1,
        "anchor_weight": 0,
        "view": False,
        "profile": False,
        "unit_length": True,
        "least_steps": 0,
    }
    assert {name: original[name] for name in theirs} == theirs
    for objective in ("gep", "gepc"):
        assert (original[objective]["weight"], original[objective]["zero_probability"]) == (1, True)
    train = {
        "epochs": 15,
        "learning_rate": 1e-4,
        "schedule": "epochs",
        "epoch_decay": 0.9,
        "warmup_share": 0,
        "weight_decay": 0,
        "asked_shares": (0.4,),
        "mode": "hide",
        "max_length": 1201,
        "tokens_per_step": 64 * 1201,
        "tokens_per_forward": 64 * 1201,
    }
    assert {name: original["train"][name] for name in train} == train
    assert original["train"]["hold_out"]["share"] == 0.1


def test_the_recipe_of_the_original_trains_dsbn_without_anchors(model, cells, tmp_path):
    original = IntegrationRecipe.named("integrate-original")
    train = original.train.with_(epochs=0.3, tokens_per_step=20_000, tokens_per_forward=20_000, validations=1)
    integrator = BatchIntegrator(model, batch_key="batch", recipe=original.with_(train=train.model_dump(), n_genes=100), threads=1)
    embedded = integrator.fit(cells).transform(cells, copy=True)
    assert embedded.obsm["X_annformer"].shape == (240, 32)
    assert integrator.model_.config.model.input_norm == "domain"
    assert "anchor" not in integrator.model_.objectives and integrator.model_.encoder.view is None
    assert integrator.model_.config.model.attention_dropout == 0.2
    np.testing.assert_allclose(np.linalg.norm(embedded.obsm["X_annformer"], axis=1), 1, atol=1e-5)
    with pytest.warns(AnnformerWarning, match="still tells batches apart"):
        integrator.corrected(cells, copy=True)
    integrator.save(tmp_path / "model")
    again = BatchIntegrator.load(tmp_path / "model").transform(cells[:20].copy(), copy=True)
    np.testing.assert_allclose(np.linalg.norm(again.obsm["X_annformer"], axis=1), 1, atol=1e-5)
