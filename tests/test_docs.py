"""The documentation is true: its examples run, its pages and links exist, the layers it names are those that are checked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
EXAMPLES = [*sorted((DOCS / "extending").glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in EXAMPLES if blocks(p, "python")], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_examples_of_a_page_run(page, tmp_path, monkeypatch, tiny_adata, tiny_model):
    """All blocks of a page run in order, in a folder that holds `cells.h5ad` and `model/`."""
    monkeypatch.chdir(tmp_path)
    tiny_adata().write_h5ad("cells.h5ad")
    tiny_model.save_pretrained("model")
    names: dict[str, object] = {"__name__": "example"}
    for code in blocks(page, "python"):
        if "tiledbsoma" in code:  # of an extra
            pytest.importorskip("tiledbsoma")
        exec(compile(code, str(page.relative_to(ROOT)), "exec"), names)
    assert len(names) > 2


@pytest.mark.parametrize("page", [p for p in EXAMPLES if blocks(p, "sh")], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_commands_of_a_page_run(page, tmp_path, monkeypatch, tiny_adata, tiny_model):
    import shlex

    from annformer.cli import main

    monkeypatch.chdir(tmp_path)
    tiny_adata().write_h5ad("cells.h5ad")
    tiny_adata(seed=1).write_h5ad("more.h5ad")
    tiny_model.save_pretrained("model")
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line)
        assert words[0] == "annformer"
        assert main(words[1:]) == 0, line


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "index" or p.parent != DOCS], ids=lambda page: str(page.relative_to(DOCS)))
def test_every_page_stands_in_a_table_of_contents(page):
    listed = set()
    for index in DOCS.rglob("index.md"):
        for toc in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(encoding="utf-8"), flags=re.DOTALL):
            entries = [line.strip() for line in toc.splitlines() if line.strip() and not line.startswith(":")]
            listed |= {path.resolve() for entry in entries for path in index.parent.glob(f"{entry}.md")}
    assert page.resolve() in listed


def test_design_names_the_layers_that_are_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert next(text for text in blocks(DOCS / "design.md", "text") if text.startswith("cli")).splitlines() == layers


def test_design_names_the_commands_that_exist():
    from annformer.cli import COMMANDS

    listed = next(text for text in blocks(DOCS / "design.md", "text") if text.startswith("annformer")).splitlines()
    assert [line.split()[1] for line in listed] == list(COMMANDS)


def test_extension_points_have_their_pages():
    assert {page.stem for page in (DOCS / "extending").glob("*.md")} == {"index", "objective", "attention", "source", "checkpoint", "task"}
