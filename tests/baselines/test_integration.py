from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import scipy.sparse as sp

from annformer.baselines import INTEGRATION, _packages, available, integration
from annformer.errors import InputError

N, N_GENES = 200, 320
TYPES = np.arange(N) % 2
BATCHES = np.where(np.arange(N) < 100, "x", "y")


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    mean = np.tile(rng.gamma(1.0, 1.0, size=N_GENES), (N, 1))
    mean[np.ix_(TYPES == 1, np.arange(80))] *= 5
    mean[BATCHES == "y"] *= np.exp(rng.normal(0, 0.3, size=N_GENES))
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32))


@pytest.fixture(autouse=True)
def few_genes(monkeypatch):
    monkeypatch.setattr(integration, "N_GENES", 100)


def separation(values: np.ndarray, groups: np.ndarray) -> float:
    """Distance of the groups' centres by the spread within them."""
    centres = np.stack([values[groups == group].mean(axis=0) for group in np.unique(groups)])
    within = np.mean([values[groups == group].var(axis=0).sum() for group in np.unique(groups)])
    return float(((centres[0] - centres[1]) ** 2).sum() / within)


PCA, HARMONY = ([name for name in INTEGRATION if name.startswith(start)] for start in ("PCA", "Harmony"))


@pytest.mark.parametrize("name", PCA)
def test_pca_keeps_types_and_batches(counts, name):
    found = INTEGRATION[name](counts, BATCHES, seed=0)
    assert found.shape == (N, 50)
    assert found.dtype == np.float32
    assert separation(found, TYPES) > 0.1
    assert separation(found, BATCHES) > 0.05
    assert np.array_equal(found, INTEGRATION[name](counts, BATCHES, seed=0))


def test_the_variants_of_pca_differ(counts):
    every, few, scaled = (INTEGRATION[name](counts, BATCHES, seed=0) for name in PCA)
    assert not np.allclose(np.abs(every), np.abs(few))
    assert not np.allclose(np.abs(few), np.abs(scaled))


@pytest.mark.parametrize("name", HARMONY)
def test_harmony_brings_batches_together_and_keeps_types(counts, name):
    pytest.importorskip("harmonypy")
    before = INTEGRATION[name.replace("Harmony", "PCA").split(",")[0]](counts, BATCHES, seed=0)
    found = INTEGRATION[name](counts, BATCHES, seed=0)
    assert found.shape == before.shape
    assert found.dtype == np.float32
    assert separation(found, BATCHES) < 0.5 * separation(before, BATCHES)
    assert separation(found, TYPES) > 0.7 * separation(before, TYPES)
    assert np.array_equal(found, INTEGRATION[name](counts, BATCHES, seed=0))


def test_the_ridge_penalty_of_harmony_matters(counts):
    pytest.importorskip("harmonypy")
    first, second = (INTEGRATION[name](counts, BATCHES, seed=0) for name in ("Harmony HVG", "Harmony HVG, ridge 1"))
    assert not np.allclose(first, second)


def test_scvi_runs_and_its_seed_decides(counts, tmp_path, monkeypatch, caplog, capsys):
    pytest.importorskip("scvi")
    import torch

    monkeypatch.chdir(tmp_path)
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    with caplog.at_level(logging.INFO):
        found = INTEGRATION["scVI HVG"](counts, BATCHES, seed=0, max_epochs=3)
    assert found.shape == (N, 10)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.name.startswith(("lightning", "scvi"))]
    assert capsys.readouterr() == ("", "")
    random.seed(5)  # nothing is drawn from the process's own generators
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert np.array_equal(found, INTEGRATION["scVI HVG"](counts, BATCHES, seed=0, max_epochs=3))
    assert not np.allclose(found, INTEGRATION["scVI HVG"](counts, BATCHES, seed=1, max_epochs=3))


@pytest.mark.slow
def test_scvi_brings_batches_together_and_keeps_types(counts):
    pytest.importorskip("scvi")
    before, found = (INTEGRATION[name](counts, BATCHES, seed=0) for name in ("PCA HVG", "scVI HVG"))
    assert separation(found, BATCHES) < 0.5 * separation(before, BATCHES)
    assert separation(found, TYPES) > 0.1


@pytest.mark.parametrize("n_cells", [20, 200, 143, 144, 1_283, 1_409])
def test_scvi_trains_on_all_but_a_tenth_in_batches_that_it_can_normalise(n_cells):
    learnt, held = integration._split(n_cells, 0)
    assert sorted([*learnt, *held]) == list(range(n_cells))
    assert n_cells // 10 <= len(held) <= n_cells // 10 + 2
    assert len(learnt) % 128 == 0 or len(learnt) % 128 >= 3


def test_what_is_not_installed_is_named(counts, monkeypatch):
    monkeypatch.setattr(_packages, "find_spec", lambda _: None)
    assert available("PCA HVG") is None
    assert available("Harmony HVG scaled") == "pip install 'annformer[harmony]'"
    assert available("scVI HVG") == "pip install 'annformer[baselines]'"
    for name in ("Harmony HVG", "scVI HVG"):
        with pytest.raises(InputError, match="pip install"):
            INTEGRATION[name](counts, BATCHES, seed=0)
