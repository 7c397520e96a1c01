from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix, csr_matrix

from annformer.data import AnnDataSource
from annformer.inference import encode_cells, estimate, evaluating, read_ahead
from annformer.tokenizer import TokenizerSettings

SHORT = TokenizerSettings(max_length=60)  # most cells of the fixture express more genes: the sampling is in play


def states(model, data, **options):
    """Cell states in source order."""
    options = {"settings": SHORT} | options
    return np.concatenate([cell for _, cell in encode_cells(model, AnnDataSource(data), **options)])


@pytest.fixture
def expected(tiny_model, tiny_adata):
    return states(tiny_model, tiny_adata())


def assert_same(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_states_are_those_of_the_model_cell_by_cell(tiny_model, tiny_adata, expected):
    from annformer.tokenizer import tokenize

    cells = next(iter(AnnDataSource(tiny_adata()).batches(1, vocab=tiny_model.vocab, rows=np.array([7]))))
    with torch.inference_mode():
        alone = tiny_model.encode(tokenize(cells, SHORT, cls_id=tiny_model.vocab.cls_id), wanted="cell").cell.numpy()
    assert_same(expected[7:8], alone)
    assert np.ptp(expected, axis=0).max() > 0.01  # the cells differ, so equality says something


@pytest.mark.parametrize(
    "options", [{"size": 1}, {"size": 7}, {"size": 59}, {"max_tokens": 1}, {"max_tokens": 150}, {"workers": 0}, {"workers": 3}]
)
def test_chunks_and_workers_change_nothing(tiny_model, tiny_adata, expected, options):
    assert_same(states(tiny_model, tiny_adata(), **options), expected)


def test_threads_change_nothing(tiny_model, tiny_adata, expected):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(states(tiny_model, tiny_adata()), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fails", [False, True])
def test_forwards_run_side_by_side_on_one_thread_each(tiny_model, tiny_adata, monkeypatch, fails):
    seen, before = set(), torch.get_num_threads()

    def encode(tokens, wanted, inner=tiny_model.encode):
        seen.add((threading.current_thread().name.rpartition("_")[0], torch.get_num_threads()))
        if fails:
            raise MemoryError
        return inner(tokens, wanted=wanted)

    monkeypatch.setattr(tiny_model, "encode", encode)
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError) if fails else nullcontext():
            states(tiny_model, tiny_adata())
        assert seen == {("annformer-forward", 1)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_order_of_cells_changes_nothing(tiny_model, tiny_adata, expected):
    order = np.random.default_rng(1).permutation(60)
    assert_same(states(tiny_model, tiny_adata()[order], size=16), expected[order])


def test_order_of_genes_changes_nothing(tiny_model, tiny_adata, expected):
    adata = tiny_adata()
    assert_same(states(tiny_model, adata[:, np.random.default_rng(2).permutation(adata.n_vars)].copy()), expected)


@pytest.mark.parametrize(
    "store", [csr_matrix, csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.float64), lambda x: x.astype(np.int64)]
)
def test_matrix_type_changes_nothing(tiny_model, tiny_adata, expected, store):
    adata = tiny_adata()
    adata.X = store(adata.X)
    assert_same(states(tiny_model, adata), expected)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("store", [csr_matrix, csc_matrix, lambda x: x.toarray()])
@pytest.mark.filterwarnings("ignore")  # zarr announces its next format
def test_file_format_changes_nothing(tiny_model, tiny_adata, expected, tmp_path, suffix, store):
    adata = tiny_adata()
    adata.X = store(adata.X)
    path = tmp_path / f"cells{suffix}"
    adata.write_h5ad(path) if suffix == ".h5ad" else adata.write_zarr(path)
    assert_same(states(tiny_model, path, size=16), expected)


def test_runs_come_in_order_from_start(tiny_model, tiny_adata, expected):
    runs = list(encode_cells(tiny_model, AnnDataSource(tiny_adata()), settings=SHORT, size=16, start=32))
    assert [rows.tolist() for rows, _ in runs] == [list(range(32, 48)), list(range(48, 60))]
    assert_same(np.concatenate([cell for _, cell in runs]), expected[32:])


def test_cells_without_known_genes_are_nan(tiny_model, tiny_adata, expected):
    adata = tiny_adata()
    dense = adata.X.toarray()
    dense[[0, 31]] = 0
    adata.X = csr_matrix(dense)
    found = states(tiny_model, adata, size=16)
    others = np.delete(np.arange(60), [0, 31])
    assert np.isnan(found[[0, 31]]).all()
    assert_same(found[others], expected[others])


def test_budget_holds_in_every_forward(tiny_model, tiny_adata, monkeypatch):
    sizes = []
    encode = tiny_model.encode

    def watched(tokens, wanted):
        sizes.append((tokens.check().n_tokens, tokens.n_cells))
        return encode(tokens, wanted)

    monkeypatch.setattr(tiny_model, "encode", watched)
    states(tiny_model, tiny_adata(), max_tokens=150)
    assert all(tokens <= 150 or cells == 1 for tokens, cells in sizes)
    assert sum(cells for _, cells in sizes) == 60
    assert any(cells > 1 for _, cells in sizes)


def test_progress_adds_up_to_all_cells(tiny_model, tiny_adata):
    seen = []
    adata = tiny_adata()
    adata.X = csr_matrix(adata.X.toarray() * (np.arange(60) != 3)[:, None])
    states(tiny_model, adata, size=16, max_tokens=500, advance=seen.append)
    assert sum(seen) == 60
    assert len(seen) > 4


def test_every_submodule_gets_its_mode_back(tiny_model):
    tiny_model.train()
    next(tiny_model.encoder.children()).eval()
    before = [module.training for module in tiny_model.modules()]
    with evaluating(tiny_model):
        assert not any(module.training for module in tiny_model.modules())
    assert [module.training for module in tiny_model.modules()] == before
    assert len(set(before)) == 2


def test_dropout_is_off_and_the_mode_restored_when_left_early(tiny_model, tiny_adata, expected):
    tiny_model.train()
    runs = encode_cells(tiny_model, AnnDataSource(tiny_adata()), settings=SHORT, size=16)
    assert_same(next(runs)[1], expected[:16])
    runs.close()
    assert tiny_model.training


def test_two_at_once_on_one_model_do_not_switch_dropout_on_for_each_other(tiny_model, tiny_adata, expected):
    tiny_model.train()
    first, second = (encode_cells(tiny_model, AnnDataSource(tiny_adata()), settings=SHORT, size=16) for _ in range(2))
    both = threading.Barrier(2, timeout=30)
    found = []

    def to_the_end():
        next(first)
        both.wait()  # both are at work
        list(first)
        both.wait()

    thread = threading.Thread(target=to_the_end)
    thread.start()
    found.append(next(second)[1])
    both.wait()
    both.wait()  # the other one is done
    found.extend(cell for _, cell in second)
    thread.join()
    assert_same(np.concatenate(found), expected)
    assert all(module.training for module in tiny_model.modules())


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_read_ahead_keeps_the_order(workers):
    def work(n):
        time.sleep(0.001 * (n % 3))
        return n * n

    assert list(read_ahead(iter(range(30)), work, workers)) == [n * n for n in range(30)]


def test_read_ahead_is_bounded():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield n

    results = read_ahead(items(), lambda n: n, 2)
    for _ in range(5):
        next(results)
    time.sleep(0.05)
    assert len(taken) <= 5 + 2 + 2
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("annformer-read")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_read_ahead_hands_errors_on(workers):
    def items():
        yield from range(4)
        msg = "the file ends here"
        raise ValueError(msg)

    with pytest.raises(ValueError, match="the file ends here"):
        list(read_ahead(items(), lambda n: n, workers))


def test_estimate_is_of_the_right_size(tiny_model, tiny_adata):
    source = AnnDataSource(tiny_adata(n_obs=400))
    told = estimate(tiny_model, source, settings=SHORT)
    began = time.perf_counter()
    list(encode_cells(tiny_model, source, settings=SHORT, workers=0))
    assert told.n_cells == 400
    assert 40 < told.mean_tokens <= 60
    taken = time.perf_counter() - began
    assert 0.05 * taken < told.seconds < 5 * taken + 0.5
    assert 50e6 < told.memory_bytes < 8e9
    assert told.hints == ()  # short enough
    assert len(told.lines()) == 1
    assert estimate(tiny_model, source, settings=SHORT, start=399).n_cells == 1


def test_estimate_leaves_out_what_happens_once(tiny_model, tiny_adata, monkeypatch):
    source = AnnDataSource(tiny_adata(n_obs=400))
    batches, opened = source.batches, []

    def slow_to_open(*args, **options):
        if not opened:
            time.sleep(0.5)
        opened.append(True)
        return batches(*args, **options)

    monkeypatch.setattr(source, "batches", slow_to_open)
    monkeypatch.setattr("annformer.inference._seconds_per_cell", lambda *_: 0.0)
    assert estimate(tiny_model, source, settings=SHORT).seconds < 0.4


def test_estimate_times_forwards_side_by_side_and_more_cells_of_a_fast_model(tiny_model, tiny_adata, monkeypatch):
    from annformer import inference

    timed, inner = [], inference._encode
    monkeypatch.setattr(
        inference, "_encode", lambda model, prepared, *rest: (timed.append(len(prepared.rows)), inner(model, prepared, *rest))[1]
    )
    monkeypatch.setattr(inference, "_LONG_ENOUGH", np.inf)
    estimate(tiny_model, AnnDataSource(tiny_adata(n_obs=300)), settings=SHORT)
    assert timed == [2, 16, 64, 256, 300]


def test_estimate_of_a_long_run_names_what_would_shorten_it(tiny_model, tiny_adata, monkeypatch):
    source = AnnDataSource(tiny_adata())
    source.match(tiny_model.vocab)
    monkeypatch.setattr("annformer.inference._seconds_per_cell", lambda *_: 100.0)
    told = estimate(tiny_model, source)
    assert told.seconds == pytest.approx(6000, rel=0.01)
    first, second = told.lines()
    assert "1.7 h" in first
    for word in ("max_length ", "device cuda", "2 layers deep and 32 wide"):
        assert word in second
