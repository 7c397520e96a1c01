"""The tables: what names a human gene has (shipped), and the user's orthologs."""

from __future__ import annotations

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from annformer.errors import input_error
from annformer.vocab import GeneVocab

ENSEMBL: Final = re.compile(r"(?<![A-Z0-9])ENSGR?(\d{10,11})(?:\.\d+)?(?:_PAR_Y)?(?!\d)")
"""A human Ensembl gene id, with or without version, anywhere in a name in upper case."""

_NOT_ALNUM: Final = re.compile(r"[^A-Z0-9]")


class Names:
    """Names of one kind and the genes they stand for."""

    def __init__(self) -> None:
        self.gene: dict[str, int] = {}
        self.shared: dict[str, set[int]] = {}
        """Names that several genes have."""

    def add(self, joined: str, gene: int) -> None:
        """Note names, joined by bars, for a gene."""
        for name in joined.split("|") if joined else ():
            other = self.gene.setdefault(name, gene)
            if other != gene:
                self.shared.setdefault(name, {other}).add(gene)

    def find(self, name: str) -> int | None:
        """Return the only gene that has this name, None if there is none or several."""
        return None if name in self.shared else self.gene.get(name)


class GeneTable(NamedTuple):
    """The shipped table: numbers of genes by every kind of name, names in upper case."""

    symbols: list[str]
    current: dict[str, int]
    previous: Names
    alias: Names
    ensembl: Names
    """Ensembl ids without ENSG and leading zeros."""
    entrez: Names

    def gene(self, text: str, *, aliases: bool = True) -> tuple[int | str | None, str]:
        """Return the gene that a name stands for and how; a current symbol comes first, then a name that Ensembl used, then an alias.

        An Ensembl id that the table does not hold stands for itself.
        """
        hit = ENSEMBL.search(text) if "ENSG" in text else None
        if hit is not None:
            number = str(int(hit[1]))
            gene = self.ensembl.find(number)
            return (f"ENSG{number}" if gene is None else gene), "ensembl" if hit[0] == text else "composite"
        if text in self.current:
            return self.current[text], "symbol"
        if text in self.previous.gene:
            return self.previous.find(text), "previous"
        gene = self.alias.find(text) if aliases else None
        if gene is None and text.startswith("LOC"):  # NCBI names a gene without a symbol LOC and its Entrez number
            gene = self.entrez.find(text[3:])
        return gene, "alias"

    def candidates(self, text: str) -> tuple[str, ...]:
        """Return the symbols of the genes that an ambiguous name may stand for; empty if it is not ambiguous."""
        names = self.previous if text in self.previous.gene else self.alias
        known = text in self.current or text not in names.shared
        return () if known else tuple(sorted(self.symbols[gene] for gene in names.shared[text]))


@lru_cache(maxsize=1)
def load_table() -> GeneTable:
    """Read the shipped table, once."""
    table = GeneTable([], {}, Names(), Names(), Names(), Names())
    with gzip.open(Path(__file__).with_name("names.tsv.gz"), "rt", encoding="utf-8") as stream:
        lines = [line.rstrip("\n").split("\t") for line in stream if not line.startswith("#")]
    for gene, (symbol, previous, alias, ensembl, entrez) in enumerate(lines):
        table.symbols.append(symbol)
        table.current[symbol.upper()] = gene
        table.previous.add(previous.upper(), gene)
        table.alias.add(alias, gene)
        table.ensembl.add(ensembl, gene)
        table.entrez.add(entrez, gene)
    return table


@lru_cache(maxsize=1)
def table_vocab() -> GeneVocab:
    """Every gene of the shipped table as a vocabulary: what names are held against where there is no model."""
    return GeneVocab(tuple(dict.fromkeys(load_table().symbols)))


def squeeze(text: str) -> str:
    """Return what R's make.names (and Seurat) leave of a name: every special character as a full stop, X before a digit."""
    return _NOT_ALNUM.sub(".", "X" + text if text[:1].isdigit() else text)


def squeezed_names(names: Iterable[str]) -> dict[str, str]:
    """Squeezed name -> name, for the names that squeezing changes and that stay apart."""
    found: dict[str, str | None] = {}
    for name in names:
        if not name.isalnum() or name[0].isdigit():
            key = squeeze(name)
            found[key] = name if found.get(key, name) == name else None
    return {key: name for key, name in found.items() if name is not None}


@lru_cache(maxsize=1)
def squeezed_table() -> dict[str, str]:
    """Squeezed name -> name for the symbols of the table, current and previous."""
    return squeezed_names([*load_table().current, *load_table().previous.gene])


def read_orthologs(path: str | Path) -> dict[str, str]:
    """Read a table of two columns, names in another species and human names; tabs or commas, plain or gzipped, a header does no harm.

    A name with several human genes keeps the one with the same symbol, if there is one; otherwise it is left out: it is not known
    which one was meant.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"there is no file {path}"
        raise input_error(msg, "a table of orthologs with two columns", "give the path of such a file, or a mapping")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        lines = [line.strip("\r\n") for line in stream if line.strip() and not line.startswith("#")]
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    humans: dict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
        if len(cells) != 2:
            msg = f"line {number} of {path} has {len(cells)} columns: {line[:80]!r}"
            raise input_error(msg, "two columns: the name in the other species, the human name", "keep only these two columns")
        if all(cells):
            humans[cells[0]].add(cells[1])
    same = {name: human for name, choices in humans.items() for human in choices if human.upper() == name.upper()}
    return {name: next(iter(choices)) for name, choices in humans.items() if len(choices) == 1} | same
