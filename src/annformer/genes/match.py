"""Names -> tokens of a vocabulary."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Int, Shaped

from annformer.errors import input_error
from annformer.genes.looks import are_entrez, is_name, look_at, looks_like_mouse
from annformer.genes.report import HOW, MatchReport, spread
from annformer.genes.table import ENSEMBL, load_table, read_orthologs, squeeze, squeezed_names, squeezed_table
from annformer.vocab import GeneVocab, is_special

_SURENESS: Final = {how: rank for rank, how in enumerate(HOW)}
_MOUSE_READS: Final = ("symbol", "case", "previous", "alias", "mangled")
_SEPARATORS: Final = " _|:;,/.-()[]"
_GENOME: Final = re.compile(r"(?:GRCH3[78]|HG19|HG38)(?:-\d{4}-[A-Z])?[_-]+(?=.)")
_LOCUS: Final = re.compile(r"(?:LOC|FLJ|MGC|DKFZP)\w+|\w+(?:-\w+)?\.\d+")
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

    def find(self, text: str, *, aliases: bool = True) -> tuple[int, str] | None:
        """Find a name in upper case by its text, then by its gene."""
        if text in self.folded:
            return self.folded[text], "case"
        gene, how = self.table.gene(text, aliases=aliases)
        if gene in self.by_gene:
            token, token_how = self.by_gene[gene]
            return token, how if how in ("ensembl", "composite") else max(how, token_how, key=_SURENESS.__getitem__)
        if how == "composite":
            found = self.find(_symbol_part(text), aliases=aliases)
            return None if found is None else (found[0], "composite")
        return None

    def repair(self, text: str, *, aliases: bool = True) -> tuple[int, str] | None:
        """Find a damaged name: undo what spreadsheets, R, references of two species and `make_unique` do to names."""
        date = next((hit for pattern in _DATES if (hit := pattern.fullmatch(text))), None)
        if date is not None:
            genes = (self.find(f"{family}{int(date['day'])}") for family in _MONTHS[date["month"]])
            found = next((gene for gene in genes if gene is not None), None)
            return None if found is None else (found[0], "spreadsheet")
        plain = _GENOME.sub("", text, count=1) if _GENOME.match(text) else text
        found = self.find(plain, aliases=aliases) if plain != text else None
        found = found or self._unsqueeze(plain)
        known = self.table.gene(plain)[0] is not None or bool(self.table.candidates(plain))
        unique = None if known else _MADE_UNIQUE.fullmatch(plain)
        if found is None and unique is not None:
            # aliases are too many and too short to guess that IL-1 is a second IL
            found = self.find(unique[1], aliases=False) or self._unsqueeze(unique[1])
        return None if found is None else (found[0], "mangled")

    def _unsqueeze(self, text: str) -> tuple[int, str] | None:
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
        The vocabulary of the model.
    orthologs
        For other species: names there -> human names (symbols or Ensembl ids), or the path of a table with these two columns. What it
        does not hold, and mouse genes without a table, go by the same-symbol rule (Actb -> ACTB), which uses no aliases.
    """
    texts = tuple(map(str, names))
    index = _index(vocab)
    table = read_orthologs(orthologs) if isinstance(orthologs, str | Path) else orthologs or {}
    search = _Search(index, table, mouse=looks_like_mouse(texts), entrez=are_entrez(texts))
    found = _without_second_loci({text: search.find(text) for text in dict.fromkeys(texts)})
    ids = np.array([found[text][0] for text in texts], dtype=np.int64)
    how = np.array([found[text][1] for text in texts], dtype=f"<U{max(map(len, HOW))}")
    candidates = {text: index.table.candidates(text.strip().upper()) for text, (i, _) in found.items() if i < 0 and not search.mouse}
    ambiguous = {text: symbols for text, symbols in candidates.items() if symbols}
    return GeneMatch(names=texts, ids=ids, how=how, vocab=vocab, ambiguous=ambiguous)


def _without_second_loci(found: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Leave out the name of a place (RP11-284N8.3, LOC100288637) that is an alias of a gene which another column stands for already.

    An annotation that lists both means two places, and the gene must not get the counts of the other one.
    """
    places = {text for text, (_, how) in found.items() if how == "alias" and _LOCUS.fullmatch(text.upper())}
    taken = {i for text, (i, _) in found.items() if text not in places}
    return {text: (-1, "") if text in places and token[0] in taken else token for text, token in found.items()}


@dataclass(frozen=True)
class _Search:
    """How the names of one list are read."""

    index: _Index
    orthologs: Mapping[str, str]
    mouse: bool
    entrez: bool

    def find(self, name: str) -> tuple[int, str]:
        """Return the token's id and how it was found, -1 and "" for none."""
        text = name.strip().upper()
        if not is_name(text):
            return -1, ""
        human = self.orthologs.get(name.strip(), self.orthologs.get(text.partition(".")[0])) if self.orthologs else None
        if human is not None:
            found = self._human(human)
            return (-1, "") if found is None else (found[0], "ortholog")
        found = self._human(name)
        if found is None:
            return -1, ""
        return (found[0], "same-symbol") if self.mouse and found[1] in _MOUSE_READS else found

    def _human(self, name: str) -> tuple[int, str] | None:
        index, text = self.index, name.strip().upper()
        if name in index.exact:
            hit = ENSEMBL.search(text) if "ENSG" in text else None
            return index.exact[name], "symbol" if hit is None else "ensembl" if hit[0] == text else "composite"
        if self.entrez:
            gene = index.table.entrez.find(text.removesuffix(".0"))
            return (index.by_gene[gene][0], "entrez") if gene in index.by_gene else None
        return index.find(text, aliases=not self.mouse) or index.repair(text, aliases=not self.mouse)


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Which token of a vocabulary each column stands for."""

    names: tuple[str, ...]
    ids: Int[np.ndarray, "column"]
    """Token of each column, -1 for none. Several columns may share one: their counts belong together."""
    how: Shaped[np.ndarray, "column"]
    """How each column found its token: a key of `HOW`, "" for none."""
    vocab: GeneVocab = field(repr=False)
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Unmatched names that could be several genes, with their symbols."""

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
        unmatched = [name for name in columns.pop(-1, []) if is_name(name)]
        times = Counter(self.how.tolist())
        return MatchReport(
            n_columns=len(self.names),
            n_named=self.n_named,
            n_matched=sum(map(len, columns.values())),
            n_genes=len(columns),
            by_how={how: times[how] for how in HOW if times[how]},
            collapsed={self.vocab.tokens[i]: names for i, names in sorted(columns.items()) if len(names) > 1},
            n_unmatched=len(unmatched),
            unmatched=spread(unmatched, 10),
            n_ambiguous=len(self.ambiguous),
            ambiguous={name: list(self.ambiguous[name]) for name in spread(list(self.ambiguous), 10)},
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
