"""Our imitation of the original's network and data preparation, in the way it ships, to measure against.

Written from a description of its behaviour, not from its code. `prove` runs it on golden data of the original and must pass before any
ratio is printed. What is slow here is slow on purpose: padded batches, PyTorch's encoder layers, one cell at a time.

    python benchmarks/original.py FOLDER      # FOLDER holds a_pretrain/ (and embed_data/, tokenization/, binning/ to prove those too)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASK_VALUE, PAD_VALUE = -1, -2
TOLERANCE = 2e-6


class GeneEncoder(nn.Module):
    def __init__(self, n_tokens: int, width: int, pad_id: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width, padding_idx=pad_id)
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids))


class ValueEncoder(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(values.unsqueeze(-1).clamp(max=512)))
        return self.dropout(self.norm(self.linear2(hidden)))


class ValueDecoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1))

    def forward(self, states: Tensor) -> Tensor:
        return self.fc(states).squeeze(-1)


class CellDecoder(nn.Module):
    """Values from the cell embedding and gene queries (the authors' MVC)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(width, width)
        self.W = nn.Linear(width, width, bias=False)

    def forward(self, cell: Tensor, genes: Tensor) -> Tensor:
        return torch.bmm(self.W(torch.sigmoid(self.gene2query(genes))), cell.unsqueeze(-1)).squeeze(-1)


class Generated(NamedTuple):
    values: Tensor
    """Predictions at the asked tokens, cell x asked."""
    cell: Tensor
    from_cell: Tensor | None
    """Predictions of the cell decoder, cell x (perceived + asked)."""


class Original(nn.Module):
    """The authors' transformer with the parameter names of their checkpoints (PyTorch spelling of the attention)."""

    def __init__(
        self, n_tokens: int, width: int, n_heads: int, ff_width: int, n_layers: int, *, pad_id: int, cls_id: int, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.pad_id, self.cls_id = pad_id, cls_id
        self.encoder = GeneEncoder(n_tokens, width, pad_id)
        self.value_encoder = ValueEncoder(width, dropout)
        self.flag_encoder = nn.Embedding(2, width)
        layer = nn.TransformerEncoderLayer(width, n_heads, ff_width, dropout, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, n_layers)
        self.decoder = ValueDecoder(width)
        self.mvc_decoder = CellDecoder(width)

    @classmethod
    def load(cls, folder: Path, dropout: float = 0.0) -> Original:
        """Read a checkpoint folder in the published layout."""
        args, vocab = (json.loads((folder / name).read_text()) for name in ("args.json", "vocab.json"))
        sizes = [args[name] for name in ("embsize", "nheads", "d_hid", "nlayers")]
        model = cls(len(vocab), *sizes, pad_id=vocab["<pad>"], cls_id=vocab["<cls>"], dropout=dropout)
        weights = torch.load(folder / "best_model.pt", map_location="cpu", weights_only=True)
        model.load_state_dict({name.replace("Wqkv.", "in_proj_"): value for name, value in weights.items()})
        return model

    def encode(self, genes: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """States of all positions, cell x token x width; PyTorch takes its nested-tensor fast path in eval mode without gradients."""
        return self.transformer_encoder(self.encoder(genes) + self.value_encoder(values), src_key_padding_mask=padding)

    def forward(self, genes: Tensor, values: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value predictions, cell embeddings and the cell decoder's predictions of masked-value training."""
        states = self.encode(genes, values, padding)
        return self.decoder(states), states[:, 0], self.mvc_decoder(states[:, 0], self.encoder(genes))

    def generate(
        self, perceived: Tensor, values: Tensor, asked: Tensor, cell: Tensor | None = None, *, decode_cell: bool = True
    ) -> Generated:
        """One pass of generative pretraining over the two streams."""
        seen_genes, asked_genes = self.encoder(perceived), self.encoder(asked)
        seen = seen_genes + self.value_encoder(values)
        if cell is not None:
            seen = torch.cat([cell.unsqueeze(1), seen[:, 1:]], 1)
        states = asked_genes + self.flag_encoder.weight[1]
        seen_padding, asked_padding = perceived == self.pad_id, asked == self.pad_id
        for layer in self.transformer_encoder.layers:
            seen, states = _two_streams(layer, seen, states, seen_padding, asked_padding)
        predicted = self.decoder(torch.cat([seen, states], 1))[:, perceived.shape[1] :]
        from_cell = self.mvc_decoder(seen[:, 0], torch.cat([seen_genes, asked_genes], 1)) if decode_cell else None
        return Generated(predicted, seen[:, 0], from_cell)


def _two_streams(
    layer: nn.TransformerEncoderLayer, seen: Tensor, asked: Tensor, seen_padding: Tensor, asked_padding: Tensor
) -> tuple[Tensor, Tensor]:
    attention = layer.self_attn
    own = attention(seen, seen, seen, key_padding_mask=seen_padding, need_weights=False)[0]
    context = _cross_attention(attention, seen, asked, seen_padding, asked_padding)  # never passes out_proj
    streams = []
    for states, update in ((seen, own), (asked, context)):
        states = layer.norm1(states + layer.dropout1(update))
        states = layer.norm2(states + layer.dropout2(layer.linear2(layer.dropout(F.relu(layer.linear1(states))))))
        streams.append(states)
    return streams[0], streams[1]


def _cross_attention(attention: nn.MultiheadAttention, seen: Tensor, asked: Tensor, seen_padding: Tensor, asked_padding: Tensor) -> Tensor:
    """Asked tokens look at all perceived ones and themselves: identity projections, materialised mask, weights averaged in vain."""
    width, n_asked, n_seen = asked.shape[-1], asked.shape[1], seen.shape[1]
    query, own_key, own_value = F.linear(asked, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    _, key, value = F.linear(seen, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    keys, values = torch.cat([key, own_key], 1).transpose(0, 1), torch.cat([value, own_value], 1).transpose(0, 1)
    forbidden = torch.cat([torch.zeros(n_asked, n_seen, dtype=torch.bool), ~torch.eye(n_asked, dtype=torch.bool)], 1)
    one = torch.eye(width)
    context, _ = F.multi_head_attention_forward(
        query.transpose(0, 1),
        keys,
        values,
        width,
        attention.num_heads,
        in_proj_weight=None,
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=attention.dropout,
        out_proj_weight=one,
        out_proj_bias=None,
        training=attention.training,
        key_padding_mask=torch.cat([seen_padding, asked_padding], 1),
        need_weights=True,
        attn_mask=forbidden,
        use_separate_proj_weight=True,
        q_proj_weight=one,
        k_proj_weight=one,
        v_proj_weight=one,
    )
    return context.transpose(0, 1)


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return F.mse_loss(predicted * mask, target * mask, reduction="sum") / mask.sum()


def generative_losses(
    model: Original, perceived: Tensor, values: Tensor, asked: Tensor, target: Tensor, *, passes: int = 2
) -> list[Tensor]:
    """Return the losses of a pretraining step: asked values, the same from the cell, in a second pass asked values from the given cell."""
    valid = asked != model.pad_id
    first = model.generate(perceived, values, asked)
    predictions = [first.values, first.from_cell[:, perceived.shape[1] :]]
    if passes == 2:
        predictions.append(model.generate(perceived, values, asked, first.cell.detach(), decode_cell=False).values)
    return [masked_mse(predicted, target, valid) for predicted in predictions]


def training_step(model: Original, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor], *, passes: int = 2) -> list[Tensor]:
    """One step of the authors' generative pretraining: one pass or both, clipping at 1, Adam."""
    losses = generative_losses(model, *batch, passes=passes)
    optimizer.zero_grad()
    sum(losses).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def bin_values(row: np.ndarray | Tensor, n_bins: int = 51) -> np.ndarray | Tensor:
    """Bin one cell's values by its own quantiles; ties are drawn from numpy's global generator, as in the original."""
    values = row.numpy() if isinstance(row, Tensor) else row
    if values.max() == 0:
        return torch.zeros_like(row) if isinstance(row, Tensor) else np.zeros_like(row)
    chosen = values.nonzero() if values.min() <= 0 else slice(None)
    edges = np.quantile(values[chosen], np.linspace(0, 1, n_bins - 1))
    digits = _draw_between(values[chosen], edges)
    binned = np.zeros_like(values, dtype=np.int64) if isinstance(row, Tensor) else np.zeros_like(values)
    binned[chosen] = digits
    return torch.from_numpy(binned) if isinstance(row, Tensor) else binned


def _draw_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    left, right = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return np.ceil(np.random.rand(len(values)) * (right - left) + left).astype(np.int64)  # noqa: NPY002  the original draws globally


class Collator:
    """Lists of one cell's tensors to padded batches: bins, samples, pads, one cell at a time.

    Parameters
    ----------
    ratios
        Shares of asked genes to choose from, for generative pretraining; None for embedding.
    """

    def __init__(self, pad_id: int, max_length: int = 1200, ratios: Sequence[float] | None = None) -> None:
        self.pad_id, self.max_length, self.ratios = pad_id, max_length, ratios

    def __call__(self, cells: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        length = min(self.max_length, max(len(cell["genes"]) for cell in cells))
        if self.ratios is not None:
            return self._split(cells, length)
        rows = [self._fit(*self._binned(cell), length) for cell in cells]
        return {"gene": torch.stack([genes for genes, _ in rows]), "expr": torch.stack([values for _, values in rows])}

    def _split(self, cells: Sequence[Mapping[str, Tensor]], length: int) -> dict[str, Tensor]:
        share = np.random.choice(self.ratios)  # noqa: NPY002  the original draws globally
        n_asked = int((length - 1) * share)
        columns: list[list[Tensor]] = [[], [], [], []]
        for cell in cells:
            genes, values = self._binned(cell)
            order = torch.randperm(len(genes) - 1) + 1
            n = int(len(order) * share)
            seen = torch.cat([torch.zeros(1, dtype=torch.int64), order[n:]])
            seen_part = self._fit(genes[seen], values[seen], length - n_asked)
            parts = seen_part + self._fit(genes[order[:n]], values[order[:n]], n_asked)
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
        names = ("pcpt_gene", "pcpt_expr", "gen_gene", "gen_expr_target")
        return {name: torch.stack(column) for name, column in zip(names, columns, strict=True)}

    def _binned(self, cell: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        values = cell["expressions"]
        values[1:] = bin_values(values[1:]).float()
        return cell["genes"], values

    def _fit(self, genes: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        n = len(genes)
        if n > length:  # the first one is kept, `<cls>` or not
            chosen = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(n - 1)[: length - 1] + 1])
            return genes[chosen], values[chosen]
        genes = torch.cat([genes, torch.full((length - n,), self.pad_id, dtype=genes.dtype)])
        return genes, torch.cat([values, torch.full((length - n,), PAD_VALUE, dtype=values.dtype)])


class CellDataset(torch.utils.data.Dataset):
    """Non-zero genes of the rows of a dense matrix, `<cls>` first."""

    def __init__(self, counts: np.ndarray, gene_ids: np.ndarray, cls_id: int) -> None:
        self.counts, self.gene_ids, self.cls_id = counts, gene_ids, cls_id

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self.counts[i]
        nonzero = row.nonzero()[0]
        genes = np.insert(self.gene_ids[nonzero], 0, self.cls_id)
        values = np.insert(row[nonzero], 0, PAD_VALUE)
        return {"genes": torch.from_numpy(genes).long(), "expressions": torch.from_numpy(values).float()}


def batches(
    model: Original, counts: np.ndarray, gene_ids: np.ndarray, *, max_length: int = 1200, batch_size: int = 64, n_workers: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of dense rows."""
    dataset = CellDataset(counts, gene_ids, model.cls_id)
    yield from torch.utils.data.DataLoader(
        dataset, batch_size, collate_fn=Collator(model.pad_id, max_length), num_workers=n_workers, shuffle=False
    )


@torch.no_grad()
def embed_data(
    model: Original, counts: np.ndarray, gene_ids: np.ndarray, *, max_length: int = 1200, batch_size: int = 64, n_workers: int | None = None
) -> np.ndarray:
    """Normalised cell embeddings the way the original's `embed_data` makes them."""
    n_workers = min(len(os.sched_getaffinity(0)), batch_size) if n_workers is None else n_workers
    model.eval()
    rows = []
    for batch in batches(model, counts, gene_ids, max_length=max_length, batch_size=batch_size, n_workers=n_workers):
        rows.append(model.encode(batch["gene"], batch["expr"], batch["gene"] == model.pad_id)[:, 0].numpy())
    embeddings = np.concatenate(rows)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def prove(parity_folder: str | Path) -> dict[str, float]:
    """Run the imitation on the original's golden data; largest relative difference per group.

    Parameters
    ----------
    parity_folder
        Holds `a_pretrain/`; `binning/`, `tokenization/` and `embed_data/` are proved as well where they exist.

    Raises
    ------
    SystemExit
        When a group differs by more than 2e-6: then no ratio may be printed.
    """
    folder = Path(parity_folder)
    groups = {"forward": _prove_forward, "generative": _prove_generative, "train_traj": _prove_training}
    differences = {name: check(folder / "a_pretrain") for name, check in groups.items()}
    optional = {"binning": prove_binning, "tokenization": prove_collator, "embed_data": _prove_embedding}
    differences |= {name: check(folder) for name, check in optional.items() if (folder / name).is_dir()}
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        sys.exit(f"benchmarks/original.py does not reproduce the original ({wrong}, allowed {TOLERANCE}): no ratio is printed")
    return differences


def _golden(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def _golden_files(folder: Path, pattern: str) -> list[dict[str, Tensor]]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        sys.exit(f"there is no {folder / pattern} to prove the imitation by: no ratio is printed")
    return [_golden(path) for path in paths]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / (1 + expected.abs().max()))


@torch.no_grad()
def _prove_forward(folder: Path) -> float:
    model, worst = Original.load(folder).eval(), []
    for golden in _golden_files(folder, "forward*.npz"):
        inputs = golden["src"], golden["values"], golden["key_padding_mask"]
        worst.append(_difference(model.encode(*inputs), golden["enc_fastpath"]))
        with slow_path():
            found = (model.encode(*inputs), *model(*inputs))
        names = ("enc", "out_mlm_output", "out_cell_emb", "out_mvc_output")
        worst += [_difference(value, golden[name]) for name, value in zip(names, found, strict=True)]
    return max(worst)


@torch.no_grad()
def _prove_generative(folder: Path) -> float:
    model, worst = Original.load(folder).eval(), []
    for golden in _golden_files(folder, "generative_*.npz"):
        inputs = golden["pcpt_gene"], golden["pcpt_expr"], golden["gen_gene"]
        first = model.generate(*inputs)
        second = model.generate(*inputs, first.cell, decode_cell=False)
        losses = generative_losses(model, *inputs, golden["gen_expr_target"])
        names = ("out_gen_preds", "out_cell_emb", "out_mvc_output", "pass2_gen_preds", "loss_mse", "loss_mvc", "loss_gen")
        found = (*first, second.values, *losses)
        worst += [_difference(value, golden[name]) for name, value in zip(names, found, strict=True)]
    return max(worst)


def _prove_training(folder: Path) -> float:
    golden, model = _golden(folder / "train_traj.npz"), Original.load(folder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=float(golden["lr"]))
    batch = [golden[name] for name in ("pcpt_gene", "pcpt_expr", "gen_gene", "gen_expr_target")]
    losses = [torch.stack(training_step(model, optimizer, batch)).detach() for _ in golden["losses"]]
    worst = [_difference(torch.stack(losses), golden["losses"].float())]
    for name, value in model.state_dict().items():
        pair = value, golden["final." + name.replace("in_proj_", "Wqkv.")]
        if name.endswith("in_proj_bias"):  # the key's bias cannot change a softmax: its gradient is rounding, which Adam scales up
            pair = tuple(torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in pair)
        worst.append(_difference(*pair))
    return max(worst)


def prove_binning(folder: Path) -> float:
    golden, wrong = np.load(folder / "binning" / "binning.npz"), 0
    for name in [name[:-6] for name in golden.files if name.endswith(".input")]:
        for n_bins in (51, 11, 5):
            np.random.seed(1234)  # noqa: NPY002  the golden data were drawn with it
            wrong += not np.array_equal(bin_values(golden[f"{name}.input"], n_bins), golden[f"{name}.n{n_bins}.out_seed1234"])
    return float(wrong)


def prove_collator(folder: Path) -> float:
    inputs, wrong = np.load(folder / "tokenization" / "collator_inputs.npz"), 0
    for path in sorted((folder / "tokenization").glob("collator_*_sample_*.npz")):
        style, length = path.stem.split("_")[1::2]
        if style == "gen":  # no training of theirs can use it
            continue
        arrays = [(inputs[f"genes{i}"], inputs[f"expr{i}"].copy()) for i in range(4)]
        cells = [{"genes": torch.from_numpy(genes), "expressions": torch.from_numpy(values)} for genes, values in arrays]
        np.random.seed(77)  # noqa: NPY002  the golden data were drawn with it
        torch.manual_seed(77)
        found = Collator(200, int(length), ratios=[0.25, 0.5, 0.75] if style == "both" else None)(cells)
        wrong += sum(not torch.equal(value, _golden(path)[name]) for name, value in found.items())
    return float(wrong)


def _prove_embedding(folder: Path) -> float:
    import anndata

    model = Original.load(folder / "a_pretrain")
    vocab = json.loads((folder / "a_pretrain" / "vocab.json").read_text())
    adata = anndata.read_h5ad(folder / "embed_data" / "continuous.h5ad")
    names = adata.var["feature_name"].astype(str).to_numpy()
    known = np.isin(names, list(vocab))
    gene_ids = np.array([vocab[name] for name in names[known]])
    found = embed_data(model, adata.X.toarray()[:, known], gene_ids, batch_size=16, n_workers=0)
    expected = _golden(folder / "embed_data" / "continuous.npz")["X_scGPT_len1200_seed0"]
    return _difference(torch.from_numpy(found), expected)


@contextmanager
def slow_path() -> Iterator[None]:
    """Without PyTorch's nested-tensor fast path, which is slower still on CPU; not what ships."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how far the imitation is from the original's golden data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parity_folder")
    for name, difference in prove(parser.parse_args(arguments).parity_folder).items():
        print(f"{name:14} {difference:.1e}")


if __name__ == "__main__":
    main()
