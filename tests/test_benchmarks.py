from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_startup_prints_its_table(script, capsys) -> None:
    script("startup").main(["--rounds", "1", "--n_tokens", "500"])
    printed = capsys.readouterr().out
    assert "import annformer" in printed
    assert "500 tokens" in printed


def test_scripts_name_no_path_of_a_machine() -> None:
    for path in (ROOT / "benchmarks").glob("*"):
        if path.is_file():
            assert "/work" not in path.read_text(), path
