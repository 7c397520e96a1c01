"""Compile `src/annformer/genes/names.tsv.gz`, the table of human gene names that `annformer.genes` reads.

    python scripts/compile_genes.py REFS src/annformer/genes/names.tsv.gz

REFS is a folder with public lists of gene names (file names in `SOURCES`). Only facts are taken from them: which symbol is current, which
names a gene had before, which Ensembl and Entrez numbers it has. One line is a gene:

symbol      current HGNC symbol, or Ensembl's name for a gene without one
previous    names that an Ensembl or GENCODE release used for this Ensembl id, where they are not the symbol
alias       further names that HGNC lists (its aliases and previous symbols; the source does not tell them apart)
ensembl     numbers of the Ensembl gene ids (ENSG and leading zeros left out)
entrez      Entrez gene numbers
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

HGNC, BIOMART, ANNOTABLES, GENCODE = (
    "hgnchelper_alias_to_approved.tsv.gz",
    "biomart_gene_positions_scprint.tsv.gz",
    "annotables_grch38.tsv.gz",
    "gencode_human_ensembl_symbol.tsv.gz",
)
SOURCES = {
    HGNC: "HGNC symbols as in the R package HGNChelper; HGNC data are CC0",
    BIOMART: "Ensembl BioMart export; Ensembl data are free of restrictions",
    ANNOTABLES: "Ensembl GRCh38 as in the R package annotables; Ensembl data are free of restrictions",
    GENCODE: "GENCODE id to symbol; GENCODE data are open access",
}
# spreadsheets write MARCH1 as 1-Mar; annformer.genes has a rule for that, and numbers like 3/1 are no names
DATE = re.compile(r"\d{1,2}[-/]\d{1,2}|\d{1,2}-(JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)", re.IGNORECASE)
# the GENCODE list has lost the suffix of clone names (AC092092.3): what is left is no gene
CLONE = re.compile(r"[A-Z]\d{5}|[A-Z]{2}\d{6}|[A-Z]{4}\d{8}|[A-Za-z]+\d*[a-z]?-\d+[A-Z]+\d+|\d+")
# Ensembl calls hundreds of places Y_RNA or U6: a name without HGNC entry that a release gives to more places than this is a family,
# not a gene (two places: the pseudoautosomal regions of X and Y)
MAX_LOCI = 2


@dataclass
class Gene:
    previous: set[str] = field(default_factory=set)
    alias: set[str] = field(default_factory=set)
    ensembl: set[int] = field(default_factory=set)
    entrez: set[int] = field(default_factory=set)


@dataclass
class Names:
    """What Ensembl's releases call one Ensembl id, newest first."""

    names: list[str] = field(default_factory=list)
    entrez: set[int] = field(default_factory=set)
    noncoding: bool = False
    """In the newest release, as an RNA gene or pseudogene."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refs", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    genes, current = read_hgnc(arguments.refs / HGNC)
    ensembl = read_ensembl(arguments.refs)
    drop_families(ensembl, current)
    later = [number for number, names in ensembl.items() if not add_by_symbol(genes, current, number, names)]
    for number in later:
        add_by_alias(genes, current, number, ensembl[number])
    lines = [*header(arguments.refs, len(genes)), *(line(symbol, genes[symbol]) for symbol in sorted(genes))]
    # mtime=0: the same sources give the same bytes
    arguments.out.write_bytes(gzip.compress("".join(f"{one}\n" for one in lines).encode(), compresslevel=9, mtime=0))
    print(f"{len(genes)} genes, {arguments.out.stat().st_size / 1e6:.2f} MB -> {arguments.out}")


def rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_hgnc(path: Path) -> tuple[dict[str, Gene], dict[str, str]]:
    """HGNC's genes and the current symbol for every unambiguous name, in upper case."""
    genes: dict[str, Gene] = defaultdict(Gene)
    owners: dict[str, set[str]] = defaultdict(set)
    for row in rows(path):
        name, symbol = row["Symbol"].strip().strip('"'), row["Approved.Symbol"].strip().strip('"')
        gene = genes[symbol]
        if name and name.upper() != symbol.upper() and not DATE.fullmatch(name):
            gene.alias.add(name.upper())
            owners[name.upper()].add(symbol)
    current = {name: next(iter(symbols)) for name, symbols in owners.items() if len(symbols) == 1}
    return genes, current | {symbol.upper(): symbol for symbol in genes}


def read_ensembl(refs: Path) -> dict[int, Names]:
    """Names and Entrez numbers of every human Ensembl gene id."""
    found: dict[int, Names] = defaultdict(Names)
    columns = {BIOMART: ("ensembl_gene_id", "hgnc_symbol", "entrezgene_id"), ANNOTABLES: ("ensgene", "symbol", "entrez")}
    for source, (id_column, name_column, entrez_column) in columns.items():
        for row in rows(refs / source):
            if row[id_column].startswith("ENSG0"):
                entry = found[int(row[id_column][4:])]
                entry.names.append(row[name_column])
                entry.noncoding |= source == BIOMART and re.search("RNA|pseudogene", row["gene_biotype"]) is not None
                # the exports hold 84771.0 for 84771, and NA for none
                entry.entrez |= {int(float(row[entrez_column]))} if re.fullmatch(r"\d+(\.0)?", row[entrez_column]) else set()
    for row in rows(refs / GENCODE):
        if row["#geneId"].startswith("ENSG0") and not CLONE.fullmatch(row["symbol"]):
            found[int(row["#geneId"][4:])].names.append(row["symbol"])
    return found


def drop_families(ensembl: dict[int, Names], current: dict[str, str]) -> None:
    """Take out the names of families of genes."""
    loci = Counter(name for names in ensembl.values() for name in set(names.names))
    for names in ensembl.values():
        names.names = [name for name in names.names if loci[name] <= MAX_LOCI or is_symbol(name, current)]


def add_by_symbol(genes: dict[str, Gene], current: dict[str, str], number: int, names: Names) -> bool:
    """Give the Ensembl id to the gene whose current symbol is its newest name; say whether there is one."""
    symbol = next((current[name.upper()] for name in called(names) if is_symbol(name, current)), None)
    if symbol is not None:
        add(genes[symbol], symbol, current, number, names)
    return symbol is not None


def add_by_alias(genes: dict[str, Gene], current: dict[str, str], number: int, names: Names) -> None:
    """Give the Ensembl id to the gene that has its name among its aliases, or make a gene of it.

    HGNC has merged non-coding entries that Ensembl still counts apart (MIR583HG into CAST): they must not be added up. Other ids are
    retired ones, whose gene has got a new id, or copies of a gene on other haplotypes under its old name.
    """
    if not called(names):
        return
    symbols = [current[name.upper()] for name in called(names) if name.upper() in current]
    symbol = next((symbol for symbol in symbols if not (names.noncoding and genes[symbol].ensembl)), called(names)[0])
    add(genes[symbol], symbol, current, number, names)


def add(gene: Gene, symbol: str, current: dict[str, str], number: int, names: Names) -> None:
    gene.ensembl.add(number)
    gene.entrez |= names.entrez
    # a name that is now the symbol of some gene is nobody's previous name, whatever a release said
    gene.previous |= {name for name in called(names) if name.upper() != symbol.upper() and not is_symbol(name, current)}


def called(names: Names) -> list[str]:
    return [name for name in dict.fromkeys(names.names) if name not in ("", "NA") and not name.startswith("ENSG")]


def is_symbol(name: str, current: dict[str, str]) -> bool:
    return current.get(name.upper(), "").upper() == name.upper()


def line(symbol: str, gene: Gene) -> str:
    previous = {name.upper() for name in gene.previous}
    cells = (sorted(gene.previous), sorted(gene.alias - previous), sorted(gene.ensembl), sorted(gene.entrez))
    return "\t".join([symbol, *("|".join(map(str, cell)) for cell in cells)])


def header(refs: Path, n_genes: int) -> list[str]:
    text = [f"# Names of {n_genes} human genes, compiled by scripts/compile_genes.py on {datetime.now(UTC):%Y-%m-%d}. Facts only. Sources:"]
    for name, what in SOURCES.items():
        text.append(f"# {what}; sha256 {hashlib.sha256((refs / name).read_bytes()).hexdigest()[:16]}")
    return [*text, "#symbol\tprevious\talias\tensembl\tentrez"]


if __name__ == "__main__":
    main()
