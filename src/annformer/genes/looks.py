"""What a list of names looks like: decides how it is read and what to tell the user when it does not match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from annformer.genes.table import load_table


class Looks(NamedTuple):
    """What a list of names looks like and what to do when it does not match."""

    what: str
    remedy: str


_MOUSE: Final = re.compile(r"[A-Z][a-z0-9.]*[a-z][a-z0-9.]*(-[A-Za-z0-9.]+)*|[A-Z0-9]{7,10}Rik|[A-Z]\d{0,2}|H2-[A-Za-z0-9]+")
_COLUMN: Final = "put the gene names into adata.var_names, or name the var column that holds them with gene_key"
_ORTHOLOGS: Final = "give orthologs=, a mapping or a two-column table from these names to human genes"
_LOOKS: Final = (
    (re.compile(r"ENSG\d{11}.*"), Looks("human Ensembl gene ids", "choose a model whose vocabulary has these genes")),
    (re.compile(r"ENSMUSG\d{11}.*"), Looks("mouse Ensembl gene ids", _ORTHOLOGS)),
    (
        re.compile(r"ENS[A-Z]{0,4}T\d{11}.*"),
        Looks("Ensembl transcript ids", "add up the transcripts of each gene and name the columns by gene"),
    ),
    (re.compile(r"ENS[A-Z]{3,4}G\d{11}.*|FBGN\d{7}|WBGENE\d{8}"), Looks("Ensembl gene ids of another species", _ORTHOLOGS)),
    (re.compile(r"[NX][MR]_\d+.*"), Looks("RefSeq transcript ids", "add up the transcripts of each gene and name the columns by gene")),
    (re.compile(r"(CHR)?[0-9XYMT]{1,2}[:_-]\d+[-_]\d+"), Looks("chromatin peaks", "give the gene expression part of the data")),
    (re.compile(r"(.*[-_])?[ACGT]{10,}([-_].*)?"), Looks("cell barcodes", "transpose the matrix: cells are rows, genes are columns")),
    (
        re.compile(r".*[-_](TOTALSEQ\w*|TOTAL(_?PROTEIN)?|ADT|PROT(EIN)?)|(ANTI-|ADT[-_]).*"),
        Looks("proteins (antibodies)", "give the RNA part of the data"),
    ),
    (re.compile(r"\d+_([A-Z]_)?AT|A_\d+_P\d+|ILMN_\d+"), Looks("microarray probes", "give single-cell counts by gene")),
)


def look_at(names: Sequence[str]) -> Looks:
    """Say what most of the names look like; for messages, matching does not depend on it."""
    every = max(len(names) // 2000, 1)  # a sample says as much
    named = [name.strip() for name in names[::every] if is_name(name)]
    if not named:
        return Looks("blanks", _COLUMN)
    for pattern, looks in _LOOKS:
        if sum(pattern.fullmatch(name.upper()) is not None for name in named) * 2 > len(named):
            return looks
    if sum(name.removesuffix(".0").isdecimal() for name in named) * 2 > len(named):
        return (
            Looks("Entrez gene numbers", "choose a model whose vocabulary has these genes")
            if are_entrez(named)
            else Looks("row numbers", _COLUMN)
        )
    if looks_like_mouse(named):
        return Looks("mouse gene symbols", _ORTHOLOGS)
    known = sum(load_table().gene(name.upper())[0] is not None for name in named)
    if known * 2 > len(named):
        return Looks("human gene symbols", "choose a model whose vocabulary has these genes")
    return Looks("no kind of gene name that annformer knows", _COLUMN)


def looks_like_mouse(texts: Sequence[str]) -> bool:
    """Whether most names are written as mouse (and rat) symbols are: one capital, then small letters."""
    # chromatin peaks beside the genes, and Ensembl ids, say nothing about capitals
    lettered = [text for text in texts if not text.isdigit() and not text.startswith(("ENS", "chr"))]
    return sum(_MOUSE.fullmatch(text) is not None for text in lettered) * 2 > len(lettered)


def _are_row_numbers(texts: Sequence[str]) -> bool:
    numbers = {int(text) for text in texts if text.isdecimal()}
    return len(numbers) == len(texts) and max(numbers, default=0) - min(numbers, default=0) == len(numbers) - 1


def are_entrez(texts: Sequence[str]) -> bool:
    """Whether all names are numbers and these are clearly those of human genes in Entrez.

    Every third number below 65,000 is a human gene, so a few row numbers of a filtered table look alike: nearly all must be known,
    or most if there are numbers beyond any row number.
    """
    numbers = [text.strip().removesuffix(".0") for text in texts]
    if not numbers or not all(number.isdecimal() for number in numbers) or _are_row_numbers(numbers):
        return False
    known = sum(load_table().entrez.find(number) is not None for number in numbers) / len(numbers)
    return known >= 0.9 or (known >= 0.6 and max(map(int, numbers)) >= 100_000)


def is_name(name: str) -> bool:
    """Whether a column has a name at all."""
    return name.strip().lower() not in ("", "nan", "none", "na", "<na>")
