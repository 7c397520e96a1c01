"""Names -> tokens of a vocabulary."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from annformer.errors import input_error
from annformer.genes.looks import are_entrez, is_name, look_at, looks_like_mouse
from annformer.genes.report import HOW, UNTRAINED, MatchReport, spread
from annformer.genes.table import ENSEMBL, GeneTable, load_table, read_orthologs, squeeze, squeezed_names, squeezed_table
from annformer.vocab import GeneVocab, is_special

_SURENESS: Final = {how: rank for rank, how in enumerate(HOW)}
_MOUSE_READS: Final = ("symbol", "case", "previous", "alias", "mangled")
_SEPARATORS: Final = " _|:;,/.-()[]"
_GENOME: Final = re.compile(r"(?:GRCH3[78]|HG19|HG38)(?:-\d{4}-[A-Z])?[_-]+(?=.)")
_LOCUS: Final = re.compile(r"(?:LOC|FLJ|MGC|DKFZP)\w+|\w+(?:-\w+)?\.\d+")
_BESIDE: Final = re.compile(r".+-(?:AS|IT|OT)\d*")
"""An RNA that is named after a gene because it lies beside or within it: antisense, intronic, overlapping."""
_MADE_UNIQUE: Final = re.compile(r"(.+)[.-]\d{1,2}")
_MONTHS: Final = {
    **dict.fromkeys(("MAR", "03"), ("MARCH", "MARC")),
    **dict.fromkeys(("SEP", "SEPT", "09"), ("SEPT", "SEP")),
    **dict.fromkeys(("DEC", "12"), ("DEC",)),
}
_DATES: Final = (
    re.compile(r"X?(?P<day>\d{1,2})[-./ ](?P<month>MAR|SEPT?|DEC)(?:[-./ ]\d{2,4})?"),
    re.compile(r"(?P<month>MAR|SEPT?|DEC)[-./ ](?P<day>\d{1,2})"),
    re.compile(r"X?\d{4}[-./](?P<month>03|09|12)[-./](?P<day>\d{2})(?:[ T.]00[:.]00[:.]00)?"),
)


class _Hit(NamedTuple):
    """What a name finds."""

    token: int
    how: str
    alias: bool = False
    """An alias was needed, here or to tell which gene the token is."""


class _Index:
    """Everything that finds a token of one vocabulary. Special tokens are not in it."""

    def __init__(self, vocab: GeneVocab) -> None:
        self.table = load_table()
        self.exact = {token: i for i, token in enumerate(vocab.tokens) if not is_special(token)}
        upper = [(token.upper(), i) for token, i in self.exact.items()]
        times = Counter(text for text, _ in upper)
        # two tokens that differ in capitals only are told apart by exact spelling or not at all
        self.folded = {text: i for text, i in upper if times[text] == 1}
        self.folded |= {text: i for text, i in _symbol_parts(self.folded).items() if text not in times}
        self.squeezed = squeezed_names(self.folded)
        self.by_gene: dict[int | str, tuple[int, str]] = {}
        for text, i in upper:
            gene, how = self.table.gene(text)
            if gene is not None and (gene not in self.by_gene or _SURENESS[how] < _SURENESS[self.by_gene[gene][1]]):
                self.by_gene[gene] = (i, how)

    def find(self, text: str, *, aliases: bool = True) -> _Hit | None:
        """Find a name in upper case by its text, then by its gene."""
        if text in self.folded:
            return _Hit(self.folded[text], "case")
        gene, how = self.table.gene(text, aliases=aliases)
        if gene in self.by_gene:
            token, token_how = self.by_gene[gene]
            least = max(how, token_how, key=_SURENESS.__getitem__)
            return _Hit(token, how if how in ("ensembl", "composite") else least, alias=least == "alias")
        if how == "composite":
            found = self.find(_symbol_part(text), aliases=aliases)
            return None if found is None else found._replace(how="composite")
        return None

    def repair(self, text: str, *, aliases: bool = True) -> _Hit | None:
        """Find a damaged name: undo what spreadsheets, R, references of two species and `make_unique` do to names."""
        date = next((hit for pattern in _DATES if (hit := pattern.fullmatch(text))), None)
        if date is not None:
            genes = (self.find(f"{family}{int(date['day'])}") for family in _MONTHS[date["month"]])
            found = next((gene for gene in genes if gene is not None), None)
            return None if found is None else found._replace(how="spreadsheet")
        plain = _GENOME.sub("", text, count=1) if _GENOME.match(text) else text
        found = self.find(plain, aliases=aliases) if plain != text else None
        found = found or self._unsqueeze(plain)
        known = self.table.gene(plain)[0] is not None or bool(self.table.candidates(plain))
        unique = None if known else _MADE_UNIQUE.fullmatch(plain)
        if found is None and unique is not None:
            # aliases are too many and too short to guess that IL-1 is a second IL
            found = self.find(unique[1], aliases=False) or self._unsqueeze(unique[1])
        return None if found is None else found._replace(how="mangled")

    def _unsqueeze(self, text: str) -> _Hit | None:
        key = squeeze(text)
        name = self.squeezed.get(key) or squeezed_table().get(key)
        return None if name is None else self.find(name, aliases=False)


@lru_cache(maxsize=8)
def _index(vocab: GeneVocab) -> _Index:
    return _Index(vocab)


def _symbol_part(text: str) -> str:
    """Return the symbol of a name that holds symbol and Ensembl id."""
    return ENSEMBL.sub("", text, count=1).strip(_SEPARATORS)


def _symbol_parts(tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the tokens that hold symbol and Ensembl id, by the symbol, where it is the only one."""
    parts = [(_symbol_part(text), i) for text, i in tokens.items() if "ENSG" in text]
    times = Counter(part for part, _ in parts)
    return {part: i for part, i in parts if part and times[part] == 1}


def match_genes(names: Iterable[object], vocab: GeneVocab, *, orthologs: Mapping[str, str] | str | Path | None = None) -> GeneMatch:
    """Find the token of `vocab` for every gene name.

    A pure function of the list of names; their order does not matter. Exact text comes first, then the gene that a
    name stands for: symbols in any case, previous symbols, aliases, Ensembl ids with or without version, names that hold both, names
    damaged by spreadsheets or R, genome prefixes, suffixes of `make_unique`. Entrez numbers are read when all names are Entrez numbers.

    Parameters
    ----------
    names
        One name for every column; blank ones stay unmatched.
    vocab
        The vocabulary of the model. Names that find one of its untrained genes get no token.
    orthologs
        For other species: names there -> human names (symbols or Ensembl ids), or the path of a table with these two columns. What it
        does not hold, and mouse genes without a table, go by the same-symbol rule (Actb -> ACTB), which uses no aliases.
    """
    texts = tuple(map(str, names))
    index = _index(vocab)
    table = read_orthologs(orthologs) if isinstance(orthologs, str | Path) else orthologs or {}
    search = _Search(index, table, mouse=looks_like_mouse(texts), entrez=are_entrez(texts))
    hits = {text: hit for text in dict.fromkeys(texts) if (hit := search.find(text)) is not None}
    apart = {text: vocab.tokens[hits[text].token] for text in _of_other_genes(hits, index.table)}
    found = {text: hit for text, hit in hits.items() if text not in apart}
    ids = np.array([found[text].token if text in found else -1 for text in texts], dtype=np.int64)
    how = np.array([found[text].how if text in found else "" for text in texts], dtype=f"<U{max(map(len, HOW))}")
    unlearned = (ids >= 0) & ~vocab.is_trained[ids]  # only now: an unlearned gene must not leave its names to others
    ids[unlearned], how[unlearned] = -1, UNTRAINED
    unknown = [text for text in dict.fromkeys(texts) if text not in hits and not search.mouse]
    candidates = {text: index.table.candidates(text.strip().upper()) for text in unknown}
    ambiguous = {text: symbols for text, symbols in candidates.items() if symbols}
    return GeneMatch(names=texts, ids=ids, how=how, vocab=vocab, ambiguous=ambiguous, apart=apart)


def _of_other_genes(hits: Mapping[str, _Hit], table: GeneTable) -> list[str]:
    """Return the names that must stay out because another column stands for the gene that they find.

    An annotation that lists two names means two places, and a gene must not get the counts of another one. Added are only the columns
    that surely are one gene: names changed by `make_unique`, its former name, other Ensembl ids of it. So an alias stays out where
    the gene is there by a surer name (ARL5B-AS1 is an alias of NSUN6), the name of a place (RP11-284N8.3, LOC100288637) also where it
    is there by an alias, an antisense RNA that Ensembl joined with a gene (HNRNPU-AS1) where this gene is there, and of two names
    that are genes of their own in the table the less sure one.
    """
    columns: dict[int, list[str]] = defaultdict(list)
    for text, hit in hits.items():
        columns[hit.token].append(text)
    return [text for names in columns.values() if len(names) > 1 for text in _less_sure({name: hits[name] for name in names}, table)]


def _less_sure(hits: Mapping[str, _Hit], table: GeneTable) -> list[str]:
    def rank(text: str) -> int:
        name = text.strip().upper()
        if not hits[text].alias:
            return 2 if hits[text].how == "previous" and _BESIDE.fullmatch(name) else 0
        return 1 if _own_gene(text, table) is not None else 2 + bool(_LOCUS.fullmatch(name))

    best = min(map(rank, hits))
    sure = [text for text in hits if rank(text) == best]
    own = {text: gene for text in sure if (gene := _own_gene(text, table)) is not None}
    first = min(own, key=lambda text: (_SURENESS[hits[text].how], text), default=None)
    return [text for text in hits if rank(text) > best or (first is not None and own.get(text, own[first]) != own[first])]


def _own_gene(name: str, table: GeneTable) -> int | None:
    """Return the gene of which this is the symbol or an Ensembl id."""
    gene, how = table.gene(name.strip().upper(), aliases=False)
    return gene if isinstance(gene, int) and how in ("symbol", "ensembl", "composite") else None


@dataclass(frozen=True)
class _Search:
    """How the names of one list are read."""

    index: _Index
    orthologs: Mapping[str, str]
    mouse: bool
    entrez: bool

    def find(self, name: str) -> _Hit | None:
        """Return the token and how it was found."""
        text = name.strip().upper()
        if not is_name(text):
            return None
        human = self.orthologs.get(name.strip(), self.orthologs.get(text.partition(".")[0])) if self.orthologs else None
        if human is not None:
            found = self._human(human)
            return None if found is None else found._replace(how="ortholog")
        found = self._human(name)
        return found._replace(how="same-symbol") if found is not None and self.mouse and found.how in _MOUSE_READS else found

    def _human(self, name: str) -> _Hit | None:
        index, text = self.index, name.strip().upper()
        if name in index.exact:
            hit = ENSEMBL.search(text) if "ENSG" in text else None
            return _Hit(index.exact[name], "symbol" if hit is None else "ensembl" if hit[0] == text else "composite")
        if self.entrez:
            gene = index.table.entrez.find(text.removesuffix(".0"))
            return _Hit(index.by_gene[gene][0], "entrez", alias=index.by_gene[gene][1] == "alias") if gene in index.by_gene else None
        return index.find(text, aliases=not self.mouse) or index.repair(text, aliases=not self.mouse)


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Which token of a vocabulary each column stands for."""

    names: tuple[str, ...]
    ids: Int[np.ndarray, "column"]
    """Token of each column, -1 for none. Several columns may share one: their counts belong together."""
    how: Shaped[np.ndarray, "column"]
    """How each column found its token: a key of `HOW`, `untrained` for a gene that the model has not learned, "" for none."""
    vocab: GeneVocab = field(repr=False)
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Unmatched names that could be several genes, with their symbols."""
    apart: Mapping[str, str] = field(default_factory=dict)
    """Names left out because another column stands for the gene that they find, with the token of this gene."""

    @property
    def n_named(self) -> int:
        """Columns that have a name at all."""
        return sum(is_name(name) for name in self.names)

    @property
    def share(self) -> float:
        """Share of the named columns that found a token; 0 when there are none."""
        return int((self.ids >= 0).sum()) / self.n_named if self.n_named else 0.0

    def report(self) -> MatchReport:
        """Sum up for people and for `uns`."""
        columns: dict[int, list[str]] = defaultdict(list)
        for name, i in zip(self.names, self.ids.tolist(), strict=True):
            columns[i].append(name)
        n_unmatched = sum(map(is_name, columns.pop(-1, [])))
        unlearned = [name for name, how in zip(self.names, self.how.tolist(), strict=True) if how == UNTRAINED]
        unknown = [name for name, how in zip(self.names, self.how.tolist(), strict=True) if not how and is_name(name)]
        times = Counter(self.how.tolist())
        return MatchReport(
            n_columns=len(self.names),
            n_named=self.n_named,
            n_matched=sum(map(len, columns.values())),
            n_genes=len(columns),
            by_how={how: times[how] for how in HOW if times[how]},
            collapsed={self.vocab.tokens[i]: names for i, names in sorted(columns.items()) if len(names) > 1},
            n_unmatched=n_unmatched,
            unmatched=spread(unknown, 10),
            n_untrained=len(unlearned),
            untrained=spread(unlearned, 10),
            n_ambiguous=len(self.ambiguous),
            ambiguous={name: list(self.ambiguous[name]) for name in spread(list(self.ambiguous), 10)},
            n_apart=len(self.apart),
            apart={name: self.apart[name] for name in spread(list(self.apart), 10)},
            looks_like=look_at(self.names).what,
        )

    def require(self, min_share: float = 0.1, other_columns: Mapping[str, Sequence[str]] | None = None) -> None:
        """Refuse to go on when too few columns match.

        Parameters
        ----------
        min_share
            Smallest accepted share of the named columns.
        other_columns
            Columns of `var` that might hold better names; the message says which of them would match how well.

        Raises
        ------
        InputError
            With what the names look like and what to do about it.
        """
        if self.share >= min_share and self.n_named:
            return
        looks = look_at(self.names)
        examples = ", ".join(map(repr, spread([name for name in self.names if is_name(name)], 4))) or "no names"
        msg = (
            f"{int((self.ids >= 0).sum()):,} of {self.n_named:,} gene names ({self.share:.1%}) are known to this model, "
            f"whose vocabulary has {len(self.vocab.genes):,} genes; the names look like {looks.what} ({examples})"
        )
        if n_untrained := int((self.how == UNTRAINED).sum()):
            msg += f"; {n_untrained:,} more are genes of its vocabulary that it has not learned"
        better = [(name, share) for name, share in best_gene_column(other_columns or {}, self.vocab) if share > max(self.share, min_share)]
        remedy = looks.remedy
        if better:
            known = ", ".join(f"{name!r} ({share:.0%} known)" for name, share in better[:3])
            remedy = f"set gene_key={better[0][0]!r}; the var columns with better names are {known}"
        raise input_error(msg, f"at least {min_share:.0%} of the columns named by human gene symbols or Ensembl ids (ENSG...)", remedy)


def best_gene_column(candidates: Mapping[str, Iterable[object]], vocab: GeneVocab) -> list[tuple[str, float]]:
    """Match several columns that may hold gene names; return (name, share of it that is known), the best first."""
    shares = [(name, match_genes(values, vocab).share) for name, values in candidates.items()]
    return sorted(shares, key=lambda pair: -pair[1])
