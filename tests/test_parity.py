"""Our network, objectives and tokenizer against golden tensors of the reference (random weights; `golden/README.md`)."""

from pathlib import Path

import anndata
import numpy as np
import pytest

import parity_groups
from annformer.scgpt import ScGPT

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", [name for name in parity_groups.GROUPS if name != "variants"])
def test_group(name: str) -> None:
    differences = list(parity_groups.GROUPS[name](GOLDEN))
    assert differences
    assert not [difference for difference in differences if not difference.ok]


def test_a_difference_would_show() -> None:
    at = parity_groups.Comparison("planted")
    z = parity_groups.load(GOLDEN / "a_pretrain/forward.npz")
    model, _ = parity_groups.read_model(GOLDEN / "a_pretrain")
    model.encoder.layers[1].ff_norm.bias.data[3] += 1e-4
    cells = parity_groups.masked(z)
    parity_groups.outputs(model, cells, model.encode(cells.tokens), z, at, ecs=0.3)
    assert not at.found[0].ok


def test_golden_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) <= 2_000_000


def test_embed_equals_embed_data() -> None:
    """The whole road, from the file to obsm."""
    embedding = pytest.importorskip("annformer.tasks.embedding")
    adata = anndata.read_h5ad(GOLDEN / "embed_data/continuous.h5ad")
    model = ScGPT.from_pretrained(GOLDEN / "a_pretrain")
    embedding.embed(adata, model, gene_key="feature_name")
    golden = np.load(GOLDEN / "embed_data/continuous.npz")["X_scGPT_len1200_seed0"]
    np.testing.assert_allclose(adata.obsm["X_annformer"], golden, rtol=0, atol=1e-5)
