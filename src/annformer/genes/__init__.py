"""Gene identifiers: symbol, alias, Ensembl id, ortholog -> vocabulary; the match report.

Matching goes through the gene, not the spelling: a column and a token of the vocabulary meet when they are the same text, or when the
table that ships with the package (`names.tsv.gz`, made by `scripts/compile_genes.py`) says that they name the same gene. So an old symbol
in the data finds a new one in the vocabulary and the other way round. What could mean several genes is left out and reported.
"""

from __future__ import annotations

from annformer.genes.looks import look_at
from annformer.genes.match import GeneMatch, best_gene_column, match_genes
from annformer.genes.report import HOW, UNTRAINED, MatchReport
from annformer.genes.table import read_orthologs, table_vocab

__all__ = ["HOW", "UNTRAINED", "GeneMatch", "MatchReport", "best_gene_column", "look_at", "match_genes", "read_orthologs", "table_vocab"]
