from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import annformer
from annformer.evaluate import clustering
from annformer.tokens import CellBatch

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

pytestmark = [
    pytest.mark.skipif(not (ROOT / "benchmarks" / "original.py").is_file(), reason="the benchmarks are not part of an installed package"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
needs_golden = pytest.mark.skipif(not (GOLDEN / "a_pretrain").is_dir(), reason="needs tests/golden/a_pretrain")


@pytest.fixture
def script(monkeypatch) -> Iterator:
    """Import a benchmark by name, as when it is run from its folder."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    torch.set_num_threads(1)  # the sizes here are far too small for more
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@needs_golden
def test_the_imitation_reproduces_the_original(script) -> None:
    differences = script("original").prove(GOLDEN)
    assert {"forward", "generative", "train_traj"} <= set(differences)
    assert max(differences.values()) <= 2e-6


@needs_golden
def test_no_ratio_from_an_imitation_that_is_off(script, monkeypatch) -> None:
    original = script("original")
    monkeypatch.setattr(original.ValueEncoder, "forward", lambda self, values: self.norm(self.linear2(self.linear1(values[..., None]))))
    with pytest.raises(SystemExit, match="no ratio is printed"):
        original.prove(GOLDEN)


def test_binning_of_the_imitation_lies_where_the_edges_are(script) -> None:
    original = script("original")
    values = np.array([0, 1, 1, 1, 2, 7, 300], dtype=np.float32)
    binned = original.bin_values(values, 5)
    assert binned[0] == 0
    assert binned[-1] == 4
    assert set(binned[1:4]) <= {1, 2}  # two of the four edges are 1
    assert (np.diff(binned[4:]) >= 0).all()


def test_collator_pads_cuts_and_splits(script) -> None:
    original = script("original")

    def cells() -> list:
        values = [torch.arange(n + 1, dtype=torch.float32) for n in (5, 30)]
        return [{"genes": torch.arange(len(v)), "expressions": v} for v in values]

    batch = original.Collator(pad_id=99, max_length=20)(cells())
    assert batch["gene"].shape == (2, 20)
    assert (batch["gene"][0, 6:] == 99).all()
    assert (batch["expr"][0, 6:] == original.PAD_VALUE).all()
    assert batch["gene"][1].unique().numel() == 20
    split = original.Collator(pad_id=99, max_length=20, ratios=[0.5])(cells())
    assert split["pcpt_gene"].shape == (2, 11)
    assert split["gen_gene"].shape == (2, 9)
    assert (split["pcpt_gene"][:, 0] == 0).all()


def test_training_step_of_the_imitation_learns(script) -> None:
    original = script("original")
    torch.manual_seed(0)
    model = original.Original(30, 16, 2, 16, 1, pad_id=29, cls_id=28)
    genes = torch.arange(24).view(2, 12)
    batch = [genes, genes.float(), genes.flip(1)[:, :5], torch.full((2, 5), 3.0)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = [float(sum(original.training_step(model, optimizer, batch)).detach()) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_alternate_takes_turns(script) -> None:
    timing, calls = script("_timing"), []
    took = timing.alternate({"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, n=2)
    assert calls == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(took["a"].wall) == len(took["b"].cpu) == 2
    slow, fast = timing.Timing([2.0, 9.0, 4.0], [1.0] * 3), timing.Timing([1.0, 3.0, 1.0], [0.5] * 3)
    assert timing.ratio(slow, fast) == 3
    assert timing.cpu_ratio(slow, fast) == 2


@needs_golden
def test_embedding_prints_its_tables(script, tiny_adata, tmp_path, capsys) -> None:
    tiny_adata(n_obs=24).write_h5ad(tmp_path / "cells.h5ad")
    options = ["--sizes", "tiny", "--threads", "1", "--rounds", "2", "--cells", "4", "--n_tokens", "400"]
    script("embedding").main([str(tmp_path / "cells.h5ad"), "--parity", str(GOLDEN), *options])
    printed = capsys.readouterr().out
    assert "reproduces its golden data" in printed
    assert printed.count("| 16 x 1  |") == 3


def test_embedding_stops_when_the_networks_differ(script, tiny_adata) -> None:
    embedding = script("embedding")
    adata = tiny_adata(n_obs=8)
    original, ours = embedding.networks(embedding.SIZES["tiny"], embedding.vocabulary(adata.var_names, 400))
    block = embedding.blocks(adata, ours, 4, 1)[0]
    with torch.inference_mode():
        assert embedding.same_embeddings(original, ours, block) <= 2e-6
        ours.encoder.layers[0].ff_in.bias += 0.01
        with pytest.raises(SystemExit, match="no ratio is printed"):
            embedding.same_embeddings(original, ours, block)


@needs_golden
def test_training_prints_its_tables(script, tiny_adata, tmp_path, capsys) -> None:
    tiny_adata(n_obs=8).write_h5ad(tmp_path / "cells.h5ad")
    options = ["--sizes", "tiny", "--rounds", "2", "--cells", "4", "--n_tokens", "400"]
    script("training").main([str(tmp_path / "cells.h5ad"), "--parity", str(GOLDEN), *options])
    printed = capsys.readouterr().out
    assert "reproduces its golden data" in printed
    assert printed.count("two passes") == 1
    assert "| no dropout on either side " in printed


def test_training_stops_when_the_losses_differ(script, tiny_adata, monkeypatch) -> None:
    training = script("training")
    adata = tiny_adata(n_obs=8)
    options = argparse.Namespace(cells=4, rounds=1, max_length=200, share=0.5)
    vocab = training.vocabulary(adata.var_names, 400)
    block = training.questions(adata, vocab, options)[0]
    assert training.same_losses(training.SIZES["tiny"], vocab, block) <= 1e-5
    monkeypatch.setattr(training, "our_losses", lambda model, tokens: [loss.mean * 1.01 for loss in model.losses(tokens).values()])
    with pytest.raises(SystemExit, match="no ratio is printed"):
        training.same_losses(training.SIZES["tiny"], vocab, block)


def test_gpu_runs_from_end_to_end_on_a_cpu(script, capsys) -> None:
    script("gpu").main(["--device", "cpu", "--tiny", "--rounds", "1", "--warm_up", "0"])
    printed = capsys.readouterr().out
    assert printed.count("| yes |") == 8
    assert printed.count("| training ") == 2
    assert printed.count("| embedding ") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_says_that_there_is_none(script, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        script("gpu").main(["--check"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_attention_prints_its_table(script, capsys) -> None:
    script("attention").main(["--rounds", "1", "--n_tokens", "24"])
    printed = capsys.readouterr().out
    assert printed.count("| per_cell |") == printed.count("| dense    |") == 6


def test_attention_stops_when_the_ways_differ(script, monkeypatch) -> None:
    attention = script("attention")
    monkeypatch.setattr(attention, "attend", lambda q, k, v, **_: q + k + v)
    with pytest.raises(SystemExit, match="no ratio is printed"):
        attention.main(["--rounds", "1", "--n_tokens", "24"])


def test_startup_prints_its_table(script, capsys) -> None:
    script("startup").main(["--rounds", "1", "--n_tokens", "500"])
    printed = capsys.readouterr().out
    assert "import annformer" in printed
    assert "500 tokens" in printed


def test_scripts_name_no_path_of_a_machine() -> None:
    for path in (ROOT / "benchmarks").glob("*"):
        if path.is_file():
            assert "/work" not in path.read_text(), path


@pytest.fixture
def held_out(tiny_adata, tiny_model, tmp_path) -> Path:
    """A folder with two labelled sets, a model, and a store of three other studies."""
    from annformer.data.store_writer import write_store
    from annformer.scgpt import ScGPT

    for seed, name in enumerate(("first", "second")):
        tiny_adata(n_obs=70, seed=seed).write_h5ad(tmp_path / f"{name}.h5ad")
    studies = [tmp_path / f"study{i}.h5ad" for i in range(3)]
    for seed, path in enumerate(studies, 10):
        tiny_adata(n_obs=60, seed=seed).write_h5ad(path)
    write_store(studies, tmp_path / "store")
    objectives = {"gep": {"kind": "gep"}, "gepc": {"kind": "gepc"}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = tiny_model.config.model.with_(profile=True).model_dump()
        ScGPT(tiny_model.config.with_(objectives=objectives, model=network), tiny_model.vocab).save_pretrained(tmp_path / "model")
    return tmp_path


def test_pretraining_prints_and_writes_its_tables(script, held_out, monkeypatch, capsys) -> None:
    pretraining, clusters = script("pretraining"), script("pretraining_clusters")
    monkeypatch.setattr(clusters, "RESOLUTIONS", (clusters.FIXED,))
    few = script("pretraining_fewshot")
    monkeypatch.setattr(few, "CELLS_SEEN", 10)
    monkeypatch.setattr(few, "LEAST_EPOCHS", 1)
    monkeypatch.setattr(clustering, "find_spec", lambda _: None)  # k-means: the first Leiden takes seconds
    places = [
        "--model",
        str(held_out / "model"),
        "--data",
        str(held_out),
        "--store",
        str(held_out / "store"),
        "--out",
        str(held_out / "out"),
    ]
    sets = [
        "--sets",
        "first",
        "second",
        "--fewshot_sets",
        "first",
        "--cells",
        "10",
        "--random",
        "1",
        "--ranks",
        "3",
        "5",
    ]
    pretraining.main([*places, *sets, "--draws", "50", "--sizes", "20", "--seeds", "1"])
    printed = capsys.readouterr().out
    assert printed.count("| mean of sets") == 5
    assert "| CD79 " in printed
    expression = pd.read_csv(held_out / "out" / "expression.csv").set_index("set")
    assert expression.loc["first", "ridge"] < 1.2 * expression.loc["first", "gene mean"]
    assert expression.loc["first", "GEP"] > 2 * expression.loc["first", "ridge"]  # weights that learned nothing predict about 0
    assert (expression["ties"] < expression["gene mean"]).all()
    found = pd.read_csv(held_out / "out" / "clusters.csv").set_index("set")
    assert {"model", "random network", "PCA 50, all genes"} <= set(found.columns)
    assert {few.TUNED, few.SCRATCH, few.FROZEN, few.LOGISTIC} <= set(pd.read_csv(held_out / "out" / "fewshot_all.csv")["method"])


def test_labelled_cells_are_never_called(script, held_out) -> None:
    cells = script("pretraining_fewshot").Cells(held_out / "first.h5ad", seed=0)
    assert "cell_type" not in cells.asked.obs
    for seed in range(3):
        labelled = cells.labelled(20, seed)
        assert labelled.n_obs == 20
        assert not set(labelled.obs_names) & set(cells.asked.obs_names)
        assert set(labelled.obs["cell_type"]) == set(cells.adata.obs["cell_type"])


def test_corrected_expression_measures_planted_gaps(script) -> None:
    corrected = script("corrected_expression")
    obs = pd.DataFrame({"cell_type": ["T", "T", "T", "B", "B"], "batch": ["a", "a", "b", "a", "b"]})
    values = pd.DataFrame({"gene": [1.0, 3.0, 5.0, 0.0, 1.0], "other": [0.0, 0.0, 1.0, 0.0, 0.0]})
    means = corrected.type_means(values, obs)
    assert corrected.gaps(means) == {("B", "a", "b"): 0.5, ("T", "a", "b"): 2.0}
    assert corrected.of_types(means, "T", "B").to_dict() == {"gene": 3.0, "other": 0.5}


def test_corrected_expression_prints_its_tables(script, held_out, capsys) -> None:
    words = ["--data", str(held_out), "--set", "first", "--model", str(held_out / "model"), "--least_steps", "1", "--threads", "1"]
    script("corrected_expression").main(words)
    printed = capsys.readouterr().out
    assert "| as measured | as corrected |" in printed
    assert "| spread, corrected / measured |" in printed


def test_few_shot_goes_on_where_it_stopped(script, tmp_path) -> None:
    few = script("pretraining_fewshot")
    runs, calls = few.Runs(tmp_path / "runs.csv"), []

    def call(types: list[str]):
        return lambda: calls.append(types) or np.array(types)

    assert list(runs.get(("as now", "first", 20), 2, call(["a", "b c"]))) == ["a", "b c"]
    assert list(runs.get(("as now", "second", 20), 2, call(["b", "b"]))) == ["b", "b"]
    text = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(text[:-4])  # killed while it wrote the second run
    again = few.Runs(tmp_path / "runs.csv")
    assert list(again.get(("as now", "first", 20), 2, call(["x", "x"]))) == ["a", "b c"]
    assert list(again.get(("as now", "second", 20), 2, call(["c", "c"]))) == ["c", "c"]
    assert calls == [["a", "b c"], ["b", "b"], ["c", "c"]]


def test_few_shot_floors_find_planted_types_and_not_shuffled_ones(script, held_out) -> None:
    few = script("pretraining_fewshot")
    cells = few.Cells(held_out / "first.h5ad", seed=0)
    call = few.callers(annformer.ScGPT.from_pretrained(held_out / "model"), seed=0)
    labelled = cells.labelled(len(cells.pool), 0)
    for name in (few.LOGISTIC, few.FROZEN):
        assert (call[name](labelled, cells.asked, 0) == cells.truth).mean() > 0.7
    labelled.obs["cell_type"] = np.random.default_rng(0).permutation(labelled.obs["cell_type"].astype(str))
    assert (call[few.LOGISTIC](labelled, cells.asked, 0) == cells.truth).mean() < 0.65


def test_tie_noise_is_the_variance_among_equal_counts(script, tiny_model) -> None:
    expression = script("pretraining_expression")
    counts = sp.csr_array(np.array([[1.0] * 300, np.arange(1.0, 301.0)], dtype=np.float32))
    cells = CellBatch(counts, np.arange(300), np.arange(2), {})
    all_equal, none_equal = expression.tie_noise(tiny_model, cells)
    assert all_equal == pytest.approx((50**2 - 1) / 12, rel=0.1)  # bins 1 to 50, drawn evenly
    assert none_equal == 0


def test_bootstrap_draws_sources_whole(script, monkeypatch) -> None:
    cells = script("pretraining_cells")
    monkeypatch.setattr(cells, "SETS", {"a": "one", "b": "one", "c": "two"})
    assert cells.means_over("abc") == {"mean of sets": ["a", "b", "c"]}
    monkeypatch.setattr(cells, "SHARED_SOURCE", "one")
    assert cells.means_over("abc")["mean without one"] == ["c"]
    drawn = cells.resampled_mean({"a": np.array(0.0), "b": np.array(0.0), "c": np.array(3.0)}, seed=0)
    assert set(np.round(drawn, 6)) == {0.0, 1.0, 3.0}
    assert cells.verdict(0.9, 0.99, even=1, less_is_better=True) == "beats"
    assert cells.verdict(0.9, 0.99, even=0, less_is_better=False) == "beats"
    assert cells.verdict(1.01, 1.2, even=1, less_is_better=True) == "loses"
    assert cells.verdict(-0.1, 0.1, even=0, less_is_better=False) == "ties"


def test_mapping_prints_its_table(script, capsys) -> None:
    pytest.importorskip("faiss")
    mapping = script("mapping")
    vectors = mapping.Cells(16).draw(50, seed=1)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert mapping.recall(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 0.75
    mapping.main(["--n_cells", "3000", "--n_queries", "60", "--width", "16", "--exact_queries", "20", "--probed", "160"])
    printed = capsys.readouterr().out
    assert "60 queries, 3,000 x 16 vectors" in printed
    assert "| exact " in printed
    assert "12 of 75 lists" in printed


def test_annotation_prints_novelty_with_intervals(script, tmp_path, capsys) -> None:
    annotation = script("annotation")
    annotation.show_novelty(tmp_path, "blood")  # nothing was looked at
    assert not capsys.readouterr().out
    ends = {"auroc": [0.8], "low": [0.71], "high": [0.9]}
    pd.DataFrame({"label": ["T"], "method": ["annformer"], "n": [3]} | ends).to_csv(tmp_path / "novelty.csv", index=False)
    pd.DataFrame({"method": ["annformer"], "n": [1]} | ends).to_csv(tmp_path / "novelty_mean.csv", index=False)
    annotation.show_novelty(tmp_path, "blood")
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "| T | annformer | 3 | 0.8 | 0.71 | 0.9 |" in printed
    assert "| mean of types | annformer | 1 | 0.8 | 0.71 | 0.9 |" in printed
