"""What a file of cells or a model is, whether embedding will work, and what is odd: found out, never asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from annformer.data.anndata import AnnDataSource
from annformer.data.counts import look, open_matrix
from annformer.data.formats import Container, open_container
from annformer.errors import InputError
from annformer.genes import GeneMatch, best_gene_column, match_genes, table_vocab
from annformer.inference import estimate
from annformer.scgpt import DEFAULT_MODEL, ScGPT, is_checkpoint_name, locate
from annformer.tokenizer import TokenizerSettings
from annformer.vocab import GeneVocab

if TYPE_CHECKING:
    from anndata import AnnData

MODEL_FILES = ("config.json", "args.json", "model.safetensors", "best_model.pt")
N_SAMPLED = 2_000
"""Cells, in a few runs, from which the genes per cell are told."""
LOW_SHARE = 0.5
"""Below this share of known genes the match is called odd."""


@dataclass(frozen=True)
class Finding:
    """Something that the user should know before embedding."""

    weight: Literal["stops", "odd"]
    """Whether embedding would refuse the input as it is."""
    text: str
    """What it is and what to do."""


@dataclass(frozen=True)
class Inspection:
    """What was found out about a file of cells or a model."""

    source: str
    """Path or name of what was inspected."""
    what: Literal["cells", "model"]
    facts: dict[str, dict[str, Any]]
    """Section -> name -> plain value."""
    findings: tuple[Finding, ...] = ()
    """What is odd, the most serious first."""

    @property
    def works(self) -> bool:
        """Whether nothing was found that stops an embedding."""
        return not any(finding.weight == "stops" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings], "works": self.works}

    def lines(self) -> list[str]:
        """Everything as text for people."""
        lines = [f"{self.source}: {self.what}"]
        for section, values in self.facts.items():
            lines += ["", section, *(f"  {name}: {as_words(name, value)}" for name, value in values.items())]
        lines += ["", "what is odd" if self.findings else "nothing is odd"]
        lines += [f"  {finding.weight}: {finding.text}" for finding in self.findings]
        return lines


def inspect(
    source: AnnData | str | Path,
    *,
    model: ScGPT | str | Path | None = DEFAULT_MODEL,
    gene_key: str | None = None,
    layer: str | None = None,
) -> Inspection:
    """Find out what `source` is.

    Parameters
    ----------
    source
        Cells (AnnData, h5ad, zarr, 10x h5 or mtx folder) or a model (our folder, the authors', a named checkpoint, a
        repository on the Hub).
    model
        Model for which the cells are meant, by default the one that ships with the package: its vocabulary and cell length are what they
        are held against, and the time of embedding is measured. None: the gene table of the package, the default length, no time.
    gene_key
        Column of var that holds the gene names; None: the names of var.
    layer
        Layer that holds the counts; None: found out.

    Raises
    ------
    InputError
        When `source` cannot be read at all, or `gene_key` or `layer` do not exist. What is wrong inside is a finding, not an error.
    """
    if isinstance(source, str | Path) and _is_model(source):
        return _inspect_model(source)
    container = open_container(source)
    name = str(source) if isinstance(source, str | Path) else container.name
    try:
        cells = AnnDataSource(source, gene_key=gene_key, layer=layer)
    except InputError as error:
        _require_own_fault(source, error, named=gene_key is not None or layer is not None)
        return Inspection(name, "cells", _container_facts(container), (Finding("stops", str(error)),))
    finally:
        container.close()
    with cells:
        loaded = ScGPT.from_pretrained(model) if isinstance(model, str | Path) else model
        return _inspect_cells(name, cells, loaded)


def _require_own_fault(source: AnnData | str | Path, error: InputError, *, named: bool) -> None:
    """Raise `error` again when it comes from the names that the user gave and not from the cells."""
    if not named:
        return
    try:
        AnnDataSource(source).close()
    except InputError:
        return
    raise error


def _container_facts(container: Container) -> dict[str, dict[str, Any]]:
    """What can be said of cells that are refused."""
    facts: dict[str, Any] = {"format": container.format, "cells": len(container.obs.names), "genes": len(container.var.names)}
    return {"file": facts, "matrices": dict(_looks(container))}


def _looks(container: Container) -> Iterator[tuple[str, str]]:
    for where in container.matrices:
        try:
            seen = look(open_matrix(container, where).sample())
        except InputError as error:
            yield where, f"cannot be read: {str(error).splitlines()[0]}"
        else:
            yield where, seen.kind + (f" ({seen.note})" if seen.note else "")


def _inspect_cells(name: str, cells: AnnDataSource, model: ScGPT | None) -> Inspection:
    vocab, settings = (model.vocab, model.tokenizer) if model else (table_vocab(), TokenizerSettings())
    findings: list[Finding] = []
    try:
        values = cells.describe(scan=True)
    except InputError as error:
        findings.append(Finding("stops", str(error)))
        values = cells.describe()
    facts = {"file": _file_facts(name, values), "values": _value_facts(values)}
    match = match_genes(cells.gene_names, vocab)
    facts["genes"] = _gene_facts(match, values, model)
    findings += _gene_findings(cells, match, vocab)
    if "n_empty_cells" in values:
        facts["cells"], more = _cell_facts(cells, values, vocab, settings, usable=not _stopped(findings))
        findings += more
    facts["obs columns"] = _obs_facts(values)
    findings += _batch_findings(model)
    if model and not _stopped(findings):
        took = estimate(model, cells)
        facts["embedding"] = {"seconds": took.seconds, "memory_bytes": took.memory_bytes, "in words": took.lines()}
    findings += _value_findings(values)
    return Inspection(name, "cells", facts, tuple(sorted(findings, key=lambda finding: finding.weight == "odd")))


def _batch_findings(model: ScGPT | None) -> list[Finding]:
    try:
        if model:
            model.require_no_batch()
    except InputError as error:
        return [Finding("stops", str(error))]
    return []


def _stopped(findings: list[Finding]) -> bool:
    return any(finding.weight == "stops" for finding in findings)


def _file_facts(name: str, values: dict[str, Any]) -> dict[str, Any]:
    path = Path(name)
    size = {"size_bytes": _size(path)} if path.exists() else {}
    stored = {"stored": f"{values['stored']}, {values['dtype']}", "nonzero_share": values["nonzero_share"]}
    return {"format": values["format"], "cells": values["n_obs"], "genes": values["n_vars"], **stored, **size}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _value_facts(values: dict[str, Any]) -> dict[str, Any]:
    counts = values["counts"]
    others = {m["where"]: m["kind"] for m in values["matrices"] if m["where"] != counts["where"]}
    note = {"note": counts["note"]} if counts["note"] else {}
    return {"taken from": counts["where"], "kind": counts["kind"], **note, **({"other matrices": others} if others else {})}


def _value_findings(values: dict[str, Any]) -> list[Finding]:
    findings = []
    if values["counts"]["kind"] != "counts":
        findings.append(
            Finding("odd", f"no counts were found: {values['counts']['where']} holds {values['counts']['kind']} values; they will be used")
        )
    if values["n_duplicate_obs_names"]:
        findings.append(Finding("odd", f"{values['n_duplicate_obs_names']:,} cells have the name of another cell"))
    if values.get("n_empty_cells"):
        named = ", ".join(values["first_empty_cells"])
        findings.append(
            Finding(
                "odd", f"{values['n_empty_cells']:,} cells are empty ({named} ...): their embedding is NaN; --empty drop leaves them out"
            )
        )
    if values.get("n_duplicate_cells"):
        named = ", ".join(values["first_duplicate_cells"])
        findings.append(Finding("odd", f"{values['n_duplicate_cells']:,} cells equal an earlier cell in every value ({named} ...)"))
    return findings


def _gene_facts(match: GeneMatch, values: dict[str, Any], model: ScGPT | None) -> dict[str, Any]:
    known = f"the {len(match.vocab.genes) - len(match.vocab.untrained):,} genes that"
    against = f"{known} {model.name} has learned" if model else "the gene table that ships with annformer"
    names = f"var[{values['gene_key']!r}]" if values["gene_key"] else "var_names"
    return {
        "names from": names,
        "first": values["first_genes"],
        "held against": against,
        "share": match.share,
        "match": match.report().lines("the model" if model else "the gene table"),
    }


def _gene_findings(cells: AnnDataSource, match: GeneMatch, vocab: GeneVocab) -> list[Finding]:
    try:
        cells.match(vocab)
    except InputError as error:
        return [Finding("stops", str(error))]
    if match.share >= LOW_SHARE:
        return []
    better = [(name, share) for name, share in best_gene_column(cells.gene_columns, vocab) if share > match.share + 0.1]
    hint = f"; gene_key={better[0][0]!r} would match {better[0][1]:.0%}" if better else ""
    return [Finding("odd", f"only {match.share:.0%} of the columns are known genes{hint}")]


def _cell_facts(
    cells: AnnDataSource, values: dict[str, Any], vocab: GeneVocab, settings: TokenizerSettings, *, usable: bool
) -> tuple[dict[str, Any], list[Finding]]:
    facts: dict[str, Any] = {
        "empty": values["n_empty_cells"],
        "equal to an earlier cell": values["n_duplicate_cells"],
        "total per cell (median)": values["total_per_cell"]["median"],
    }
    if not usable:
        return facts, []
    n_genes = _genes_per_cell(cells, vocab)
    quantiles = np.quantile(n_genes, [0.05, 0.5, 0.95, 1]).astype(int).tolist()
    facts["known genes per cell"] = dict(zip(("5 %", "median", "95 %", "largest"), quantiles, strict=True))
    facts["max_length"] = settings.max_length
    over = float((n_genes >= settings.max_length).mean())
    if over < 0.01:
        return facts, []
    text = f"{over:.0%} of the cells express more known genes than fit ({settings.max_length - 1:,}): always the same ones are drawn"
    return facts, [Finding("odd", text)]


def _genes_per_cell(cells: AnnDataSource, vocab: GeneVocab, n_runs: int = 20) -> np.ndarray:
    """Known genes expressed in the cells of a few runs that stand for all."""
    size = min(cells.n_obs, N_SAMPLED) // min(n_runs, cells.n_obs)
    starts = np.unique(np.linspace(0, cells.n_obs - size, min(n_runs, cells.n_obs)).astype(int))
    rows = np.unique((starts[:, None] + np.arange(size)).ravel())
    return np.concatenate([np.diff(batch.counts.indptr) for batch in cells.batches(512, vocab=vocab, rows=rows)])


def _obs_facts(values: dict[str, Any]) -> dict[str, Any]:
    described = {role: [c for c in values["obs_columns"] if c["looks_like"] == role] for role in ("batch", "cell_type")}
    named = {role: [f"{c['name']} ({c['n_categories']})" for c in columns] for role, columns in described.items()}
    return {
        "all": [c["name"] for c in values["obs_columns"]],
        "look like a batch": named["batch"],
        "look like a cell type": named["cell_type"],
    }


def _is_model(source: str | Path) -> bool:
    path = Path(source).expanduser()
    if path.exists():
        return any((path / name).exists() for name in MODEL_FILES)
    is_file_name = path.suffix[1:2].isalpha()  # as in data/cells.h5ad, which could else be a repository on the Hub
    return is_checkpoint_name(source) and not is_file_name


def _inspect_model(source: str | Path) -> Inspection:
    folder = locate(source)
    model = ScGPT.from_pretrained(folder)
    config = model.config
    theirs = not (folder / "config.json").is_file()
    facts: dict[str, dict[str, Any]] = {
        "model": {
            "format": "the authors' folder" if theirs else f"annformer, format {config.format}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "size_bytes": _size(folder),
        },
        "network": config.model.model_dump(),
        "vocabulary": {
            "tokens": len(model.vocab),
            "genes": len(model.vocab.genes),
            "not learned": len(model.vocab.untrained),
            "first": list(model.vocab.genes[:5]),
        },
        "tokenizer": config.tokenizer.model_dump(),
        "objectives": {name: objective.model_dump() for name, objective in config.objectives.items()},
        "provenance": {"said": config.provenance} if isinstance(config.provenance, str) else dict(config.provenance),
    }
    return Inspection(str(source), "model", facts, tuple(_batch_findings(model)))


def as_words(name: str, value: Any) -> str:
    """One fact for people."""
    if isinstance(value, float) and name.endswith("share"):
        return f"{value:.1%}"
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_words(str(key), inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ("\n    " if any(len(str(inner)) > 40 for inner in value) else ", ").join(map(str, value)) or "none"
    return str(value)
