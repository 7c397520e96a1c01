from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from annformer.data import AnnDataSource
from annformer.data.counts import look
from annformer.errors import InputError


def counts_like(n: int = 4000) -> np.ndarray:
    return np.random.default_rng(0).poisson(2.0, size=n).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (counts_like(), "counts", ""),
        (counts_like() > 0, "counts", "binary"),
        (np.zeros(10), "counts", "only zeros"),
        (np.log1p(counts_like()), "log-normalised", "log1p of whole counts"),
        (np.log1p(counts_like() * 3.7), "log-normalised", "logarithms of normalised counts"),
        (np.log2(counts_like() * 37.3 + 1), "log-normalised", "logarithms of normalised counts"),
        (counts_like() * 123.4, "normalised", "TPM, CPM or expected counts"),
        (counts_like() / 100, "normalised", "shares"),
        (counts_like() - counts_like().mean(), "scaled", "centred"),
    ],
)
def test_kind_of_data_is_found_from_the_values(values: np.ndarray, kind: str, said: str) -> None:
    seen = look(values)
    assert seen.kind == kind
    assert said in seen.note


def made(x: object = None, raw: object = None, **layers: object) -> ad.AnnData:
    first = raw if raw is not None else x
    adata = ad.AnnData(first) if first is not None else ad.AnnData(shape=(4, 3))
    if raw is not None:
        adata.raw = adata.copy()
        adata.X = x
    adata.layers.update(layers)
    return adata


COUNTS = np.arange(12, dtype=np.float32).reshape(4, 3)
LOGGED = np.log1p(COUNTS * 3.7)
SCALED = COUNTS - 5


@pytest.mark.parametrize(
    ("adata", "layer", "where", "kind"),
    [
        (made(COUNTS), None, "X", "counts"),
        (made(LOGGED, counts=COUNTS), None, "layers['counts']", "counts"),
        (made(COUNTS, counts=LOGGED), None, "X", "counts"),
        (made(LOGGED, counts=COUNTS), "X", "X", "log-normalised"),
        (made(LOGGED, raw_counts=COUNTS), None, "layers['raw_counts']", "counts"),
        (made(LOGGED, raw=COUNTS), None, ".raw.X", "counts"),
        (made(SCALED, raw=LOGGED), None, ".raw.X", "log-normalised"),
        (made(LOGGED, raw=LOGGED), None, "X", "log-normalised"),
        (made(None, counts=COUNTS), None, "layers['counts']", "counts"),
        (made(SCALED, other=COUNTS), "other", "layers['other']", "counts"),
        (made(SCALED, raw=COUNTS), ".raw.X", ".raw.X", "counts"),
        (made(COUNTS, wanted=LOGGED), "wanted", "layers['wanted']", "log-normalised"),
    ],
)
def test_counts_are_looked_for_in_order(adata: ad.AnnData, layer: str | None, where: str, kind: str) -> None:
    choice = AnnDataSource(adata, layer=layer).counts
    assert (choice.where, choice.kind) == (where, kind)


EMPTY = np.zeros((4, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("adata", "where", "kind"),
    [
        (made(COUNTS, counts=EMPTY), "X", "counts"),
        (made(LOGGED, counts=EMPTY), "X", "log-normalised"),
        (made(EMPTY, raw=LOGGED), ".raw.X", "log-normalised"),
    ],
)
def test_an_empty_matrix_is_passed_over(adata: ad.AnnData, where: str, kind: str) -> None:
    choice = AnnDataSource(adata).counts
    assert (choice.where, choice.kind) == (where, kind)
    assert "has only zeros in the cells looked at" in choice.note


def test_an_empty_matrix_is_taken_where_there_is_no_other() -> None:
    assert AnnDataSource(made(EMPTY, counts=SCALED)).counts.where == "X"
    assert AnnDataSource(made(COUNTS, counts=EMPTY), layer="counts").counts.note == "only zeros in the cells looked at"


@pytest.mark.parametrize("values", [np.log1p(counts_like()), counts_like() * 123.4, counts_like() / 100])
def test_notes_speak_of_values_not_of_what_becomes_of_them(values: np.ndarray) -> None:
    assert "as good as counts for value bins" in look(values).note


def test_choice_is_logged_and_says_what_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="annformer"):
        choice = AnnDataSource(made(SCALED, raw=LOGGED)).counts
    assert "X is scaled" in choice.note
    assert "no matrix holds counts" in choice.note
    assert "values from .raw.X (log-normalised)" in caplog.text


def test_only_scaled_values_are_refused() -> None:
    scaled = SCALED + 0.5
    with pytest.raises(InputError, match=r"(?s)values down to -4.5: centred.*layer="):
        AnnDataSource(made(sp.csr_matrix(scaled), mine=scaled))


def test_kinds_are_found_beyond_the_first_cells() -> None:
    x = np.ones((90_000, 3), dtype=np.float32)
    x[-1, -1] = 0.5
    assert AnnDataSource(ad.AnnData(sp.csr_matrix(x))).counts.kind == "normalised"
