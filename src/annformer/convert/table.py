"""The one table of tensor names, theirs and ours, and what reads it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from annformer.errors import InputError, input_error

HEADS = ("gep", "gepc", "cls", "dar", "affine")
"""The objectives that have weights."""


class Row(NamedTuple):
    """One tensor: which part of a model it belongs to, its two names, its shape in theirs; `{n}` is a running number."""

    part: str
    theirs: str
    ours: str
    shape: str


def _linear(part: str, theirs: str, ours: str, n_out: str, n_in: str) -> tuple[Row, Row]:
    return Row(part, f"{theirs}.weight", f"{ours}.weight", f"{n_out} {n_in}"), Row(part, f"{theirs}.bias", f"{ours}.bias", n_out)


def _norm(part: str, theirs: str, ours: str) -> tuple[Row, ...]:
    return tuple(Row(part, f"{theirs}.{name}", f"{ours}.{name}", "E") for name in ("weight", "bias"))


def _running(part: str, theirs: str) -> tuple[Row, ...]:
    shapes = {"running_mean": "E", "running_var": "E", "num_batches_tracked": ""}
    return tuple(Row(part, f"{theirs}.{name}", f"encoder.input_norm.{name}", shape) for name, shape in shapes.items())


def _expression(part: str, theirs: str, ours: str) -> tuple[Row, ...]:
    """A decoder of expression: three layers, the first one may read the context as well (D)."""
    sizes = {0: ("E", "D"), 2: ("E", "E"), 4: ("1", "E")}
    return tuple(row for n, (out, into) in sizes.items() for row in _linear(part, f"{theirs}.{n}", f"{ours}.{n}", out, into))


def _classifier(part: str, theirs: str, n_classes: str) -> tuple[Row, ...]:
    ours = f"objectives.{part}"
    return (
        *_linear(f"{part}.linear", f"{theirs}._decoder.{{n}}", f"{ours}.layers.{{n}}", "E", "E"),
        *_norm(f"{part}.norm", f"{theirs}._decoder.{{n}}", f"{ours}.layers.{{n}}"),
        *_linear(part, f"{theirs}.out_layer", f"{ours}.out", n_classes, "E"),
    )


# V genes, E width, F feed-forward, B batches, M modalities, S flags, C classes, A batches of the discriminator,
# D = E or 2E what a decoder reads (state, context), Q = E or 2E what a GEPC query is made of.
TABLE: tuple[Row, ...] = (
    Row("core", "encoder.embedding.weight", "encoder.gene.weight", "V E"),
    *_norm("core", "encoder.enc_norm", "encoder.gene_norm"),
    *_linear("core", "value_encoder.linear1", "encoder.value.hidden", "E", "1"),
    *_linear("core", "value_encoder.linear2", "encoder.value.out", "E", "E"),
    *_norm("core", "value_encoder.norm", "encoder.value.norm"),
    Row("asked", "flag_encoder.weight", "encoder.asked", "2 E"),  # ours is row 1: row 0 is read nowhere in their code
    Row("flags", "pert_encoder.weight", "encoder.flag.weight", "S E"),
    Row("batch_context", "batch_encoder.embedding.weight", "encoder.batch.weight", "B E"),
    *_norm("batch_context", "batch_encoder.enc_norm", "encoder.batch_norm"),
    Row("modality", "mod_encoder.embedding.weight", "encoder.modality.weight", "M E"),
    *_norm("modality", "mod_encoder.enc_norm", "encoder.modality_norm"),
    *_norm("batch_norm", "bn", "encoder.input_norm"),
    *_running("batch_norm", "bn"),
    *_running("domain_norm", "dsbn.bns.{n}"),  # ours has one row per domain
    *_linear("layers", "transformer_encoder.layers.{n}.self_attn.Wqkv", "encoder.layers.{n}.qkv", "3E", "E"),
    *_linear("layers", "transformer_encoder.layers.{n}.self_attn.out_proj", "encoder.layers.{n}.attention_out", "E", "E"),
    *_norm("layers", "transformer_encoder.layers.{n}.norm1", "encoder.layers.{n}.attention_norm"),
    *_linear("layers", "transformer_encoder.layers.{n}.linear1", "encoder.layers.{n}.ff_in", "F", "E"),
    *_linear("layers", "transformer_encoder.layers.{n}.linear2", "encoder.layers.{n}.ff_out", "E", "F"),
    *_norm("layers", "transformer_encoder.layers.{n}.norm2", "encoder.layers.{n}.ff_norm"),
    *_expression("gep", "decoder.fc", "objectives.gep.value"),
    *_expression("gep.nonzero", "decoder.zero_logit", "objectives.gep.nonzero"),
    *_expression("affine", "decoder.coeff_decoder.fc", "objectives.affine.coefficient"),
    *_expression("affine", "decoder.bias_decoder.fc", "objectives.affine.bias"),
    *_expression("affine.nonzero", "decoder.coeff_decoder.zero_logit", "objectives.affine.coefficient_nonzero"),
    *_expression("affine.nonzero", "decoder.bias_decoder.zero_logit", "objectives.affine.bias_nonzero"),
    *_linear("gepc", "mvc_decoder.gene2query", "objectives.gepc.query", "Q", "Q"),
    Row("gepc", "mvc_decoder.W.weight", "objectives.gepc.value.weight", "D Q"),
    *_linear("gepc.nonzero", "mvc_decoder.W_zero_logit", "objectives.gepc.nonzero", "D", "Q"),
    *_classifier("cls", "cls_decoder", "C"),
    *_classifier("dar", "grad_reverse_discriminator", "A"),
)
NUMBERED = ("layers", "domain_norm", "cls.linear", "dar.linear")
_PATTERNS = tuple((re.compile(re.escape(row.theirs).replace(r"\{n\}", r"(\d+)")), row) for row in TABLE)

# where the size of a part is read from: letter, tensor, axis
SIZES = (
    ("V", "encoder.embedding.weight", 0),
    ("E", "encoder.embedding.weight", 1),
    ("F", "transformer_encoder.layers.0.linear1.weight", 0),
    ("B", "batch_encoder.embedding.weight", 0),
    ("M", "mod_encoder.embedding.weight", 0),
    ("S", "pert_encoder.weight", 0),
    ("C", "cls_decoder.out_layer.weight", 0),
    ("A", "grad_reverse_discriminator.out_layer.weight", 0),
)


def row_of(key: str) -> tuple[Row, int] | None:
    """The row of the table for a tensor of theirs, and its running number (0 where it has none)."""
    for pattern, row in _PATTERNS:
        if match := pattern.fullmatch(key):
            number = int(match[1]) if match.groups() else 0
            # Linear and LayerNorm of a classifier differ by their place only: Linear, activation, LayerNorm, Linear ...
            if row.part.endswith((".linear", ".norm")) and number % 3 != (2 if row.part.endswith(".norm") else 0):
                continue
            return row, number
    return None


def numbers_of(n_layers: int, n_domains: int, hidden: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """The running numbers of each part; `hidden`: linear layers of a classifier without the last one."""
    numbers: dict[str, Sequence[int]] = {"layers": range(n_layers), "domain_norm": range(n_domains)}
    for head, n in hidden.items():
        numbers |= {f"{head}.linear": range(0, 3 * n, 3), f"{head}.norm": range(2, 3 * n, 3)}
    return numbers


def expand(parts: Collection[str], numbers: Mapping[str, Sequence[int]]) -> Iterator[tuple[Row, int]]:
    """All tensors that these parts consist of: row of the table and running number."""
    for row in TABLE:
        if row.part.removesuffix(".linear").removesuffix(".norm") in parts:
            for n in numbers[row.part] if "{n}" in row.theirs else (0,):
                yield row, n


def refuse_unknown(names: Collection[str], known: Collection[str], what: str) -> None:
    """Raise InputError when `drop` names something that is not there."""
    if unknown := [name for name in names if name not in known]:
        near = sorted({close for name in unknown for close in difflib.get_close_matches(name, known)})
        hint = f"did you mean {', '.join(near)}" if near else "leave these names out of `drop`"
        found = f"drop names {', '.join(map(repr, unknown))}, which this model does not have"
        raise input_error(found, f"a {what} of the model: {', '.join(sorted(known)) or 'it has none'}", hint)


def tensor_error(where: str, problems: Sequence[str], expected: str, limit: int = 40) -> InputError:
    """Build the one message that lists everything wrong with a set of tensors (the first `limit` of it)."""
    lines = [f"\n    {problem}" for problem in problems[:limit]]
    more = f"\n    ... and {len(problems) - limit} more" if len(problems) > limit else ""
    return input_error(
        f"{where} does not fit:{''.join(lines)}{more}",
        expected,
        "check that the files belong together and are complete; heads that you do not need can be named in `drop`",
    )
