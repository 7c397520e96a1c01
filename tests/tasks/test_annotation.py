"""CellTypeClassifier: what it calls, how sure it is, what it keeps, what it refuses."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

import annformer as af
from annformer.data.write_columns import ALWAYS, SOMETIMES
from annformer.errors import AnnformerWarning, InputError
from annformer.model.config import ModelConfig
from annformer.scgpt import ModelFolderConfig, ScGPT
from annformer.tasks._annotation_recipe import TASK, AnnotationRecipe
from annformer.tasks._votes import UNASSIGNED
from annformer.tasks.annotation import CellTypeClassifier

TUNED = {
    "n_genes": 100,
    "max_length": 60,
    "train": {
        "epochs": 12,
        "tokens_per_step": 2000,
        "tokens_per_forward": 4000,
        "max_length": 40,
        "validations": 3,
        "patience": 3,
        "learning_rate": 2e-3,
    },
}
TYPES = ("alpha", "beta", "gamma")


def typed(genes, n, seed, types=TYPES, depth=200):
    """Cells of types that express some of their genes more; `depth` counts each, which makes many cells hard to tell."""
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(7).gamma(0.3, size=len(genes))
    kinds = rng.choice(len(types), n, p=np.array([0.6, 0.3, 0.1, 0.3][: len(types)]) / sum([0.6, 0.3, 0.1, 0.3][: len(types)]))
    rates = np.tile(profiles, (n, 1))
    for kind, name in enumerate(types):
        own = np.random.default_rng([11, "alphabetagammadelta".index(name)]).choice(len(genes), 12, replace=False)
        rates[np.ix_(kinds == kind, own)] += 1.5
    counts = rng.poisson(rates / rates.sum(1, keepdims=True) * depth)
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(np.array(types)[kinds]), "batch": rng.choice(["b0", "b1", "b2"], n)},
        index=[f"c{seed}-{i}" for i in range(n)],
    )
    return AnnData(csr_matrix(counts, dtype=np.float32), obs=obs, var=pd.DataFrame(index=list(genes)))


@pytest.fixture(scope="module")
def genes(tiny_vocab):
    return list(tiny_vocab.genes)[:150]


@pytest.fixture(scope="module")
def model(tiny_vocab):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ModelConfig(vocab_size=len(tiny_vocab), width=32, n_heads=4, n_layers=2, ff_width=32)
        return ScGPT(ModelFolderConfig(model=network, provenance={"name": "tiny"}), tiny_vocab).eval()


@pytest.fixture(scope="module")
def reference(genes):
    return typed(genes, 400, 0)


@pytest.fixture(scope="module")
def query(genes):
    return typed(genes, 600, 1)


@pytest.fixture(scope="module")
def fitted(model, reference):
    return CellTypeClassifier(model, label_key="cell_type", threads=1).fit(reference)


@pytest.fixture(scope="module")
def called(fitted, query):
    return fitted.predict(query, copy=True).obs


def accuracy(called, query, column="predicted_cell_type"):
    return (called[column].astype(str) == query.obs["cell_type"].astype(str)).mean()


def test_types_are_called_far_better_than_by_the_most_frequent_one(called, query):
    assert accuracy(called, query) > 0.85 > 0.65 > query.obs["cell_type"].value_counts(normalize=True).max()


def test_held_back_scores_are_near_those_of_new_cells(fitted, called, query):
    assert abs(fitted.held_back_["accuracy"] - accuracy(called, query)) < 0.06
    for part in ("expression", "network"):
        assert abs(fitted.held_back_[f"{part}_accuracy"] - accuracy(called, query, f"predicted_cell_type_by_{part}")) < 0.08
        assert 0 < fitted.held_back_[f"{part}_macro_f1"] <= 1
    assert fitted.held_back_["majority_accuracy"] == pytest.approx(max(fitted.n_cells_) / sum(fitted.n_cells_))


def test_the_columns_say_what_each_part_would_call(called, query):
    assert accuracy(called, query, "predicted_cell_type_by_expression") > 0.85
    assert set(called["predicted_cell_type_by_network"]) <= set(TYPES)


def test_probabilities_are_calibrated(fitted, query):
    table = fitted.predict_proba(query)
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-6)
    confidence, right = table.max(axis=1), table.idxmax(axis=1) == query.obs["cell_type"].astype(str)
    assert abs(confidence.mean() - right.mean()) < 0.04


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_cover_as_asked(fitted, query, coverage):
    sets = fitted.predict_sets(query, coverage=coverage, allow_empty=True)
    hit = sets.to_numpy()[np.arange(len(sets)), [list(sets).index(kind) for kind in query.obs["cell_type"]]]
    assert abs(hit.mean() - coverage) < 3 * np.sqrt(coverage * (1 - coverage) * (1 / 600 + 1 / 400))
    never_empty = fitted.predict_sets(query, coverage=coverage)
    assert (never_empty.sum(axis=1) > 0).all() and (never_empty.to_numpy() >= sets.to_numpy()).all()


def test_more_coverage_means_larger_sets(fitted, query):
    sizes = [fitted.predict_sets(query, coverage=share).to_numpy().sum() for share in (0.5, 0.9, 0.999)]
    assert sizes[0] <= sizes[1] <= sizes[2] and sizes[0] < sizes[2]


def test_novelty_of_known_types_is_a_percentile(fitted, query):
    novelty = fitted.novelty(query)
    assert 0.42 < novelty.mean() < 0.58
    assert 0.03 < (novelty > 0.9).mean() < 0.2


def test_types_that_one_batch_has_alone_do_not_spoil_the_rest(model, genes):
    cells = typed(genes, 400, 0)
    cells.obs["batch"] = np.where(cells.obs["cell_type"] == "gamma", "b2", np.where(np.arange(400) % 2, "b0", "b1"))
    others = (cells.obs["cell_type"] != "gamma").to_numpy()
    recipe = quick(tuning="none")
    whole = CellTypeClassifier(model, label_key="cell_type", batch_key="batch", recipe=recipe).fit(cells)
    without = CellTypeClassifier(model, label_key="cell_type", batch_key="batch", recipe=recipe).fit(cells[others].copy())
    new = typed(genes, 200, 5)
    known = new[new.obs["cell_type"] != "gamma"].copy()
    sure = [one.predict(known, copy=True).obs["predicted_cell_type_confidence"].mean() for one in (whole, without)]
    assert sure[0] > sure[1] - 0.05
    assert whole.predict_sets(known).sum(axis=1).mean() < 1.6


def test_few_cells_of_known_types_and_most_of_a_new_type_are_unassigned(fitted, genes, called):
    assert (called["predicted_cell_type"] == UNASSIGNED).mean() < 0.04
    new = typed(genes, 60, 2, types=("delta",), depth=2000)
    assert (fitted.novelty(new) > 0.95).mean() > 0.6
    assert UNASSIGNED not in set(fitted.predict(new, unassigned_above=None, copy=True).obs["predicted_cell_type"])


def test_a_cell_without_genes_has_no_type(fitted, query):
    cells = query[:3].copy()
    cells.X = csr_matrix(np.vstack([np.zeros((1, cells.n_vars)), cells.X[1:].toarray()]).astype(np.float32))
    obs = fitted.predict(cells, unassigned_above=None, copy=True).obs
    row = obs.iloc[0]
    assert row["predicted_cell_type"] == row["predicted_cell_type_by_expression"] == UNASSIGNED
    assert row["predicted_cell_type_novelty"] == 1
    assert row["predicted_cell_type_set"] == ""
    assert obs["predicted_cell_type_confidence"].isna().tolist() == [True, False, False]
    assert UNASSIGNED not in set(obs["predicted_cell_type"].iloc[1:])


def test_clusters_vote(fitted, query):
    cells = query.copy()
    cells.obs["cluster"] = query.obs["cell_type"].astype(str)
    fitted.predict(cells, cluster_key="cluster")
    assert accuracy(cells.obs, query, "predicted_cell_type_majority") == 1
    fitted.predict(cells)
    assert "predicted_cell_type_majority" not in cells.obs  # it would tell of the earlier call


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_columns_of_an_earlier_prediction_go(model, reference, fitted, query, tmp_path, suffix, recorded):
    cells = query[:50].copy()
    cells.obs["cluster"], cells.obs["kind_donor"] = "a", "d"
    fitted.predict(cells, cluster_key="cluster", key_added="kind")
    if not recorded:
        del cells.uns["annformer"]  # as anndata.concat does
    without = CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none")).fit(reference)
    read, write = {"h5ad": (anndata.read_h5ad, cells.write_h5ad), "zarr": (anndata.read_zarr, cells.write_zarr)}[suffix]
    write(tmp_path / f"in.{suffix}")
    without.predict_file(tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}", key_added="kind")
    of_file = read(tmp_path / f"out.{suffix}")
    without.predict(cells, key_added="kind")
    ends = ("", "_confidence", "_novelty", "_set", "_by_expression")
    for obs in (cells.obs, of_file.obs):
        assert set(obs) == {"cell_type", "batch", "cluster", "kind_donor"} | {f"kind{end}" for end in ends}
    mapper = af.ReferenceMapper(model, label_key="cell_type", n_neighbours=5, threads=1).fit(reference)
    mapper.predict_file(tmp_path / f"in.{suffix}", tmp_path / f"mapped.{suffix}", key_added="kind")
    mapper.predict(cells, key_added="kind")
    for obs in (cells.obs, read(tmp_path / f"mapped.{suffix}").obs):
        assert {name for name in obs if name.startswith("kind")} == {"kind", "kind_donor", "kind_share", "kind_distance", "kind_novelty"}


def test_columns_of_the_users_own_stay(fitted, query):
    cells = query[:20].copy()
    cells.obs["kind"], cells.obs["kind_majority"], cells.obs["kind_share"] = "old", "mine", 1.0
    cells.uns["annformer"] = {"kind": {"task": "embedding"}}
    fitted.predict(cells, key_added="kind")
    assert set(cells.obs["kind_majority"]) == {"mine"} and "kind_share" in cells.obs


def test_columns_that_only_the_other_task_writes_stay(fitted, query):
    cells = query[:20].copy()
    fitted.predict(cells, key_added="kind")
    cells.obs["kind_share"], cells.obs["kind_distance"] = 1.0, 2.0
    fitted.predict(cells, key_added="kind")
    assert {"kind_share", "kind_distance"} <= set(cells.obs)


def test_a_prediction_does_not_depend_on_the_other_cells_or_their_order(fitted, query):
    whole, part = fitted.predict_proba(query), fitted.predict_proba(query[::-3].copy())
    np.testing.assert_allclose(whole.loc[part.index], part, atol=1e-5)


def test_nothing_but_its_columns_is_written(fitted, query):
    cells = query.copy()
    fitted.predict(cells, key_added="kind")
    ends = ("", "_confidence", "_novelty", "_set", "_by_expression", "_by_network")
    assert set(cells.obs) - set(query.obs) == {f"kind{end}" for end in ends}
    assert set(ends) | {"_majority"} == {*ALWAYS[TASK], *SOMETIMES[TASK]}, "what goes when the cells are called again"
    assert set(cells.uns["annformer"]) == {"kind"} and not cells.obsm and (cells.X != query.X).nnz == 0


def test_saved_and_loaded_it_says_the_same(fitted, query, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = CellTypeClassifier.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.predict_proba(query), fitted.predict_proba(query), atol=1e-6)
    np.testing.assert_allclose(loaded.novelty(query), fitted.novelty(query), atol=1e-6)
    assert loaded.classes_ == TYPES and loaded.held_back_ == fitted.held_back_
    assert ScGPT.from_pretrained(tmp_path / "model").name == "tiny, annotating cell_type"
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert all(f'"{part}_macro_f1": {fitted.held_back_[f"{part}_macro_f1"]}' in card for part in ("expression", "network", "majority"))


def test_a_damaged_file_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    path = tmp_path / "model" / "classifier.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="cannot be read"):
        CellTypeClassifier.load(tmp_path / "model")


def test_a_model_of_another_kind_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(InputError, match="was made for no task"):
        CellTypeClassifier.load(tmp_path / "pretrained")


def test_an_embedding_at_hand_is_used_and_another_refused(model, fitted, reference, query):
    cells, others = reference.copy(), query.copy()
    for adata in (cells, others):
        af.embed(adata, model, progress=False)
    again = CellTypeClassifier(model, label_key="cell_type", threads=1).fit(cells, embedding="X_annformer")
    np.testing.assert_allclose(again.predict_proba(others, embedding="X_annformer"), fitted.predict_proba(query), atol=1e-5)
    af.embed(others, model, max_length=20, progress=False)
    with pytest.raises(InputError, match="max_length"):
        again.predict(others, embedding="X_annformer")


def test_cells_without_a_type_take_no_part(model, reference, fitted):
    cells = reference.copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.obs.iloc[:100, cells.obs.columns.get_loc("cell_type")] = "unlabelled"
    assert sum(CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none")).fit(cells).n_cells_) == 300


def test_batches_are_held_back_as_a_whole(model, reference):
    from annformer.data.anndata import AnnDataSource
    from annformer.tasks._annotation_cells import read_reference

    found = read_reference(AnnDataSource(reference), model.vocab, label_key="cell_type", batch_key="batch", n_folds=5, seed=0)
    assert len(set(found.folds)) == 3
    assert all(len(set(found.folds[(reference.obs["batch"] == name).to_numpy()])) == 1 for name in ("b0", "b1", "b2"))


def test_of_many_cells_some_are_drawn_and_rare_types_are_kept(model, reference):
    from annformer.tasks import _annotation_cells

    found = CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none", most_cells=120)).fit(reference)
    counts = reference.obs["cell_type"].value_counts()
    assert sum(found.n_cells_) == 120
    codes = np.repeat([0, 1], [5000, 30])
    drawn = _annotation_cells._drawn(codes, 500, 0)
    assert len(drawn) == 500 and (codes[drawn] == 1).sum() == 30
    assert len(set(drawn)) == 500 and counts.sum() == 400
    many = np.append(np.repeat(np.arange(70), 200), 70)
    assert len(set(many[_annotation_cells._drawn(many, 6000, 0)])) == 71


def short(tuning):
    """A training that is only begun."""
    return quick(tuning=tuning, train=TUNED["train"] | {"epochs": 2, "validations": 1})


def quick(**more):
    return AnnotationRecipe.read({**TUNED, **more}, where="test")


@pytest.mark.parametrize("tuning", ["full", "low-rank"])
def test_the_network_is_tuned(model, reference, query, tuning):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning=tuning), threads=1).fit(reference)
    obs = tuned.predict(query, copy=True).obs
    assert accuracy(obs, query, "predicted_cell_type_by_network") > 0.7
    assert tuned.history_["validation/cls"].dropna().iloc[-1] < tuned.history_["validation/cls"].dropna().iloc[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in tuned.model_.state_dict().items() if name in before and not torch.equal(tensor, before[name])}
    assert "encoder.layers.0.qkv.weight" in changed
    assert ("encoder.gene.weight" in changed) == (tuning == "full")


def test_the_recipe_of_the_authors_has_their_numbers():
    original = AnnotationRecipe.named("annotate-original").model_dump()
    theirs = {"n_layers": 3, "dropout": 0.2, "attention_dropout": 0.2, "view": False, "profile": False, "max_length": 3001, "zeros": 0}
    theirs |= {"tuning": "full", "depths": (), "scaled_genes": 0, "n_folds": 10, "balance": 0}
    assert {name: original[name] for name in theirs} == theirs
    train = {"epochs": 10, "learning_rate": 1e-4, "schedule": "epochs", "epoch_decay": 0.9, "mode": "none", "max_length": 3001}
    assert {name: original["train"][name] for name in train} == train
    assert original["train"]["tokens_per_step"] == 32 * 3001


@pytest.mark.parametrize("tuning", ["frozen", "low-rank"])
def test_types_that_are_the_batches_are_held_back_cell_by_cell(model, reference, tuning):
    cells = reference.copy()
    cells.obs["batch"] = cells.obs["cell_type"].astype(str)
    with pytest.warns(AnnformerWarning, match="one group of obs"):
        one = CellTypeClassifier(model, label_key="cell_type", batch_key="batch", recipe=quick(tuning=tuning), threads=1).fit(cells)
    assert one.held_back_["accuracy"] > 0.6


@pytest.mark.parametrize("tuning", ["none", "low-rank"])
def test_an_embedding_that_would_not_be_read_is_refused(model, reference, query, fitted, tuning):
    with pytest.raises(InputError, match="reads none"):
        CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning=tuning)).fit(reference, embedding="X_annformer")
    if tuning == "none":
        without = CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none")).fit(reference)
        with pytest.raises(InputError, match="reads none"):
            without.predict(query, embedding="X_annformer")


def test_cells_that_were_not_drawn_are_not_called_untyped(model, reference, caplog):
    with caplog.at_level("INFO", "annformer"):
        CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none", most_cells=100)).fit(reference)
    assert "without a type" not in caplog.text and "100 of 400 cells are learned from" in caplog.text


def test_as_the_authors_do_it_the_network_is_all_there_is(model, reference, query, tmp_path):
    recipe = AnnotationRecipe.named("annotate-original")
    recipe = recipe.with_(train=recipe.train.model_dump() | {"epochs": 1, "validations": 1})
    classifier = CellTypeClassifier(model, label_key="cell_type", recipe=recipe, threads=1).fit(reference)
    assert list(classifier.part_weights_) == ["network"] and len(classifier.history_) > 0
    assert classifier.model_.panel is not None and len(classifier.model_.panel) == reference.n_vars
    obs = classifier.predict(query, copy=True).obs
    assert "predicted_cell_type_by_expression" not in obs and set(obs["predicted_cell_type_by_network"]) <= set(TYPES)
    classifier.save(tmp_path / "model")
    again = CellTypeClassifier.load(tmp_path / "model")
    assert again.recipe == recipe
    np.testing.assert_allclose(again.predict_proba(query), classifier.predict_proba(query), atol=1e-5)


def test_from_scratch_begins_at_random_weights(model, reference):
    scratch = CellTypeClassifier(model, label_key="cell_type", pretrained=False, seed=1, threads=1).fit(reference)
    assert not torch.equal(scratch.model_.encoder.gene.weight, model.encoder.gene.weight)


def test_logarithms_are_not_tuned_on(model, reference):
    cells = reference.copy()
    cells.X = cells.X.log1p() * 0.7
    with pytest.raises(InputError, match="no counts"):
        CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="full")).fit(cells)


def test_a_type_of_one_cell_is_learned_with_a_warning(model, reference, genes):
    cells = reference.copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.obs.iloc[0, cells.obs.columns.get_loc("cell_type")] = "lonely"
    with pytest.warns(AnnformerWarning, match="'lonely'"):
        found = CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none")).fit(cells)
    assert found.classes_ == ("alpha", "beta", "gamma", "lonely")
    assert np.isfinite(found.predict_proba(cells)).all(axis=None)


@pytest.mark.parametrize("batch_key", [None, "batch"])
@pytest.mark.parametrize(("tuning", "seeds"), [("none", 5), ("frozen", 3), ("low-rank", 1), ("full", 1)])
def test_a_type_of_one_cell_does_not_stop_any_way_of_tuning(model, reference, query, tuning, seeds, batch_key):
    cells = reference[:120].copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.obs.iloc[0, cells.obs.columns.get_loc("cell_type")] = "lonely"
    for seed in range(seeds):  # decides in which fold the cell is
        one = CellTypeClassifier(model, label_key="cell_type", batch_key=batch_key, recipe=short(tuning), threads=1, seed=seed)
        with pytest.warns(AnnformerWarning, match="1 type has one cell"):
            one.fit(cells)
        assert one.classes_ == (*TYPES, "lonely") and one.held_back_["accuracy"] > 0.4
        assert np.isfinite(one.predict_proba(query[:20].copy())).all(axis=None)


@pytest.mark.parametrize("tuning", ["none", "frozen", "low-rank"])
def test_types_that_all_have_one_cell_are_refused(model, reference, tuning):
    cells = reference[:15].copy()
    cells.obs["cell_type"] = [f"t{i}" for i in range(15)]
    with pytest.raises(InputError, match="each of the 15 types"):
        CellTypeClassifier(model, label_key="cell_type", recipe=short(tuning)).fit(cells)


def test_the_fold_that_a_tuned_network_holds_back_can_say_something(model, reference):
    cells = reference.copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace("gamma", "beta")
    cells.obs.iloc[:90, cells.obs.columns.get_loc("cell_type")] = "own"
    batch = np.where(np.arange(400) % 2, "b1", "b2").astype(object)
    batch[:90] = "b0"  # the first fold, and its type is nowhere else
    cells.obs["batch"] = batch
    tuned = CellTypeClassifier(model, label_key="cell_type", batch_key="batch", recipe=short("low-rank"), threads=1).fit(cells)
    assert tuned.held_back_["network_accuracy"] > 0.4


@pytest.mark.parametrize(("n", "warned"), [(60, True), (130, False)])
def test_a_novelty_told_by_few_cells_is_warned_of_once(model, reference, caplog, n, warned):
    CellTypeClassifier(model, label_key="cell_type", recipe=quick(tuning="none")).fit(reference[:n].copy())
    assert [f"{n} cells were held back" in line for line in caplog.messages if "held back" in line] == [True] * warned


def test_genes_that_were_not_measured_count_as_average(model, fitted, query):
    rare = np.argsort(np.asarray(query.X.sum(axis=0)).ravel())[25:55]
    with pytest.warns(AnnformerWarning, match="count as average"):
        part = fitted.predict(query[:, np.setdiff1d(np.arange(query.n_vars), rare)].copy(), copy=True).obs
    assert accuracy(part, query) > 0.8
    with pytest.raises(InputError, match=r"at least \d+ of them"):
        fitted.predict(query[:, 100:].copy())


def without_five(adata):
    adata.obs = adata.obs.assign(cell_type=[None] * 5 + list(adata.obs["cell_type"])[5:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.obs.__setitem__("cell_type", "alpha"), "one type, 'alpha'"),
        (without_five, "no value in 5 of"),
        (lambda a: a.obs.__setitem__("cell_type", a.obs_names), "types that many cells share"),
        (lambda a: a.obs.drop(columns="cell_type", inplace=True), "cell_type"),
    ],
)
def test_a_reference_that_cannot_be_learned_from_is_refused(model, reference, change, words):
    cells = reference.copy()
    change(cells)
    with pytest.raises(InputError, match=words):
        CellTypeClassifier(model, label_key="cell_type").fit(cells)


@pytest.mark.parametrize(("base", "name"), [(np.e, "natural"), (2.0, "base 2")])
def test_logarithms_are_undone(model, reference, query, base, name):
    def logged(adata):
        other = adata.copy()
        sums = np.asarray(adata.X.sum(axis=1))
        other.X = csr_matrix(np.log1p(adata.X.toarray() / sums * 1e4) / np.log(base))
        return other

    recipe = quick(tuning="none")
    of_counts = CellTypeClassifier(model, label_key="cell_type", recipe=recipe).fit(reference).predict_proba(query)
    with pytest.warns(AnnformerWarning, match=name):
        of_logs = CellTypeClassifier(model, label_key="cell_type", recipe=recipe).fit(logged(reference))
    with pytest.warns(AnnformerWarning, match=name):
        found = of_logs.predict_proba(logged(query))
    assert np.abs(found - of_counts).to_numpy().max() < 0.02


def test_numbers_out_of_range_are_refused(fitted, query):
    with pytest.raises(InputError, match="coverage=1"):
        fitted.predict(query, coverage=1.0)
    with pytest.raises(InputError, match="unassigned_above=2"):
        fitted.predict(query, unassigned_above=2.0)
    with pytest.raises(InputError, match="not fitted"):
        CellTypeClassifier(label_key="cell_type").predict(query)


@pytest.mark.parametrize("name", AnnotationRecipe.shipped)
def test_shipped_recipes_are_complete(name):
    assert AnnotationRecipe.named(name).tuning in ("frozen", "full")


def test_a_classifier_says_how_it_is_used(fitted, tmp_path):
    fitted.save(tmp_path / "types")
    assert "CellTypeClassifier.load" in (tmp_path / "types" / "README.md").read_text(encoding="utf-8")


def test_probabilities_are_of_cells_in_memory(fitted):
    with pytest.raises(InputError, match="read it with anndata"):
        fitted.predict_proba("cells.h5ad")
