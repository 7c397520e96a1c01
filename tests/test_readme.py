"""What the README says is true."""

from __future__ import annotations

import re
from pathlib import Path

import anndata
import numpy as np
import pytest

from annformer.cli import COMMANDS
from annformer.scgpt import DEFAULT_MODEL, ScGPT

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(first: str) -> list[str]:
    """Lines of the fenced block that begins with `first`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if text.startswith(first)).splitlines()


def tree() -> tuple[set[str], set[str]]:
    """Names that the tree lists at the top and inside the package."""
    lines = block("Makefile ")
    package = [line.split()[1].rstrip("/") for line in lines if line[0] in "├└"]
    return {line.split()[0].rstrip("/") for line in lines if line[0] not in "├└"}, set(package)


def test_everything_in_the_tree_exists():
    top, package = tree()
    assert [name for name in top if not (ROOT / name).exists()] == []
    assert [name for name in package if not (ROOT / "src/annformer" / name).exists()] == []


def test_everything_that_exists_is_in_the_tree():
    _, package = tree()
    found = {path.name for path in (ROOT / "src/annformer").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert found - package == {"__pycache__"} & found


def test_every_line_of_the_tree_has_a_caption():
    assert [line for line in block("Makefile ")[:-1] if len(line.replace("├──", "").split()) < 2 and not line.startswith("src/")] == []


def test_the_commands_are_those_that_exist():
    assert [line.split()[1] for line in block("annformer demo")] == list(COMMANDS)


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test", "test-slow", "lint", "docs", "bench"} <= set(targets)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing but the package is needed
    names: dict[str, object] = {}
    exec("\n".join(block("import scanpy")), names)
    adata = names["adata"]
    assert isinstance(adata, anndata.AnnData)
    assert adata.obsm["X_annformer"].shape == (700, ScGPT.from_pretrained(DEFAULT_MODEL).config.model.width)
    np.testing.assert_allclose(np.linalg.norm(adata.obsm["X_annformer"], axis=1), 1, rtol=1e-5)
    assert "connectivities" in adata.obsp
