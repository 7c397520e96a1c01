"""MatchReport: what was matched, for people and for `uns`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from annformer.config import Config

HOW: Final = {
    "symbol": "the vocabulary's own name",
    "case": "other capital letters",
    "ensembl": "Ensembl id",
    "composite": "symbol and Ensembl id in one name",
    "previous": "previous symbol",
    "alias": "alias",
    "entrez": "Entrez number",
    "mangled": "name changed by R, a genome prefix or a made-unique suffix",
    "spreadsheet": "name turned into a date by a spreadsheet",
    "ortholog": "ortholog table",
    "same-symbol": "mouse gene of the same symbol",
}
"""How a column found its gene, from the surest to the least sure; a matched column has one of these, an unmatched one ""."""
UNTRAINED: Final = "untrained"
"""What stands there instead for a column that found a gene which the model has not learned."""

ADDED: Final = "counts are added (logarithms as the counts behind them)"


class MatchReport(Config):
    """What `match_genes` found, in numbers and examples."""

    n_columns: int
    n_named: int
    n_matched: int
    n_genes: int
    """Different tokens that were found."""
    by_how: dict[str, int]
    """Matched columns by the way they were found; the keys are explained in `annformer.genes.HOW`."""
    collapsed: dict[str, list[str]]
    """Genes that several columns stand for, with these columns, which are added (of logarithms, the counts behind them)."""
    n_unmatched: int
    """Named columns that are not read, whatever the reason."""
    unmatched: list[str]
    """Examples of those that no other field explains, from the first to the last."""
    n_untrained: int
    untrained: list[str]
    """Examples of columns that are genes of the vocabulary which the model has not learned."""
    n_ambiguous: int
    ambiguous: dict[str, list[str]]
    """Examples of names that could be several genes, with the symbols of these."""
    n_apart: int
    apart: dict[str, str]
    """Examples of names that stay out because another column stands for the gene that they find, with this gene."""
    looks_like: str
    """What most names look like."""

    @property
    def share(self) -> float:
        """Share of the named columns that found a gene."""
        return self.n_matched / self.n_named if self.n_named else 0.0

    def lines(self, known_to: str = "the model") -> list[str]:
        """Say it to people, the most important line first; `known_to` names what the vocabulary belongs to."""
        lines = [f"{self.n_matched:,} of {self.n_named:,} gene names ({self.share:.1%}) are known to {known_to}: {self.n_genes:,} genes"]
        if self.n_named < self.n_columns:
            lines.append(f"{self.n_columns - self.n_named:,} columns have no name")
        ways = [f"{number:,} by {HOW[how]}" for how, number in self.by_how.items() if how != "symbol"]
        lines += ["of these " + ", ".join(ways)] if ways else []
        if self.collapsed:
            total, genes = sum(map(len, self.collapsed.values())), len(self.collapsed)
            shown = [f"{gene} ({' + '.join(names)})" for gene, names in list(self.collapsed.items())[:5]]
            lines.append(f"columns that share a gene with another: {total:,} (for {genes:,}); {ADDED}: {_listed(shown, genes)}")
        if self.apart:
            shown = [f"{name} ({gene})" for name, gene in list(self.apart.items())[:5]]
            lines.append(
                f"names of a gene that another column stands for, which stay out: {self.n_apart:,}: {_listed(shown, self.n_apart)}"
            )
        if self.ambiguous:
            shown = [f"{name} ({' or '.join(symbols[:4])})" for name, symbols in list(self.ambiguous.items())[:5]]
            lines.append(f"names that could be several genes and stay out: {self.n_ambiguous:,}: {_listed(shown, self.n_ambiguous)}")
        if self.n_untrained:
            named = _listed(self.untrained[:5], self.n_untrained)
            lines.append(f"{_columns(self.n_untrained)} that the model has not learned: left out ({named})")
        if self.unmatched:
            lines.append(f"names that stay out in all: {self.n_unmatched:,}, for example {', '.join(self.unmatched)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and for `uns`: gene names are never keys, because h5ad reads a slash in a key as a folder."""
        values = self.model_dump() | {"share": self.share}
        values["collapsed"] = [f"{gene}: {', '.join(names)}" for gene, names in self.collapsed.items()]
        values["apart"] = [f"{name}: {gene}" for name, gene in self.apart.items()]
        values["ambiguous"] = [f"{name}: {', '.join(symbols)}" for name, symbols in self.ambiguous.items()]
        return values


def spread(items: Sequence[str], limit: int) -> list[str]:
    """Return up to `limit` items from the first to the last, evenly spread: neighbours are often alike."""
    if len(items) <= limit:
        return list(items)
    return [items[round(step * (len(items) - 1) / (limit - 1))] for step in range(limit)]


def _columns(number: int) -> str:
    return "1 column is a gene" if number == 1 else f"{number:,} columns are genes"


def _listed(shown: Sequence[str], total: int) -> str:
    return ", ".join(shown) + (", ..." if len(shown) < total else "")
