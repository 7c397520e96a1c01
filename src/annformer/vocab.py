"""GeneVocab: gene name <-> id, special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int

from annformer.errors import input_error

PAD: Final = "<pad>"
CLS: Final = "<cls>"
EOC: Final = "<eoc>"
SPECIAL_TOKENS: Final = (PAD, CLS, EOC)
"""Tokens that are not genes, in the order in which `GeneVocab.with_specials` appends them."""


class GeneVocab:
    """The fixed list of tokens that a model knows; a token's position is its id.

    Immutable and hashable, so that tables derived from a vocabulary can be cached. Names are compared exactly here;
    `annformer.genes.match_genes` is what understands other spellings.

    Parameters
    ----------
    tokens
        Gene names and special tokens (`<pad>`, `<cls>`, `<eoc>`), in the order of their ids.
    untrained
        Those of the genes whose rows of the weights were never fitted: they have ids, but no data are read for them.
    """

    def __init__(self, tokens: Sequence[str], untrained: Iterable[str] = ()) -> None:
        self._tokens: tuple[str, ...] = tuple(tokens)
        if "" in self._tokens:
            msg = f"token {self._tokens.index('')} of the vocabulary is empty"
            raise input_error(msg, "a name for every id", "remove or rename it")
        self._ids: dict[str, int] = {token: i for i, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            doubles = [token for i, token in enumerate(self._tokens) if self._ids[token] != i]
            msg = f"the vocabulary holds {len(doubles)} tokens more than once: {_some(doubles)}"
            raise input_error(msg, "every token once", "remove the doubles")
        self._untrained = frozenset(untrained)
        if odd := sorted(name for name in self._untrained if name not in self._ids or is_special(name)):
            msg = f"{len(odd)} of the {len(self._untrained)} untrained genes are no genes of the vocabulary: {_some(odd)}"
            raise input_error(msg, "names of genes that have an id", "use vocabulary and list as they were written")

    @classmethod
    def from_json(cls, path: str | Path, untrained: Iterable[str] = ()) -> GeneVocab:
        """Read a `vocab.json`: one flat JSON object from token to id, in any order. It does not say what is `untrained`.

        Raises
        ------
        InputError
            When the ids are not exactly 0 to n-1, a token or id stands twice, or the file is not such an object. Nothing is
            repaired: an id decides which row of the weights a gene gets.
        """
        path = Path(path)
        pairs = _read_pairs(path)
        _check_ids(pairs, path)
        tokens = [""] * len(pairs)
        for token, number in pairs:
            tokens[number] = token
        return cls(tokens, untrained)

    def to_json(self, path: str | Path) -> None:
        """Write the vocabulary as a flat JSON object from token to id, in the order of the ids; what is untrained is not in it."""
        Path(path).write_text(json.dumps(self._ids, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")

    def with_specials(self) -> GeneVocab:
        """Return a vocabulary that has all special tokens; missing ones are appended, so that no id changes."""
        missing = [token for token in SPECIAL_TOKENS if token not in self._ids]
        return GeneVocab((*self._tokens, *missing), self._untrained) if missing else self

    def all_trained(self) -> GeneVocab:
        """Return the same tokens with no gene left out, for a training that is to learn them all."""
        return GeneVocab(self._tokens) if self._untrained else self

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of their ids."""
        return self._tokens

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """The tokens that are genes, in the order of their ids."""
        return tuple(token for token in self._tokens if not is_special(token))

    @cached_property
    def is_gene(self) -> Bool[np.ndarray, "token"]:
        """For every id whether it is a gene and not a special token; not writable."""
        flags = np.array([not is_special(token) for token in self._tokens], dtype=bool)
        flags.flags.writeable = False
        return flags

    @property
    def untrained(self) -> frozenset[str]:
        """Genes that have a row of the weights which was never fitted."""
        return self._untrained

    @cached_property
    def is_trained(self) -> Bool[np.ndarray, "token"]:
        """For every id whether its row was fitted, as special tokens' always are; not writable."""
        flags = np.array([token not in self._untrained for token in self._tokens], dtype=bool)
        flags.flags.writeable = False
        return flags

    @property
    def cls_id(self) -> int:
        """Id of `<cls>`, the token whose state is the cell embedding."""
        return self._special(CLS)

    @property
    def pad_id(self) -> int:
        """Id of `<pad>`; our batches are packed and never hold it, the authors' weights do."""
        return self._special(PAD)

    def ids(self, names: Iterable[str]) -> Int[np.ndarray, "name"]:
        """Ids of `names`, -1 where a name is no token."""
        get = self._ids.get
        return np.array([get(name, -1) for name in names], dtype=np.int64)

    def _special(self, token: str) -> int:
        if token not in self._ids:
            msg = f"the vocabulary of {len(self)} tokens has no {token}"
            raise input_error(msg, "a model's vocabulary", "call `.with_specials()` on it first")
        return self._ids[token]

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, name: str) -> int:
        return self._ids[name]

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GeneVocab):
            return NotImplemented
        return self._tokens == other._tokens and self._untrained == other._untrained

    @cached_property
    def _hash(self) -> int:
        return hash((self._tokens, self._untrained))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        # hashes of strings differ between processes: a pickled vocabulary must not carry its own
        return self._tokens, tuple(sorted(self._untrained))

    def __setstate__(self, state: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __repr__(self) -> str:
        left_out = f", {len(self._untrained)} of them untrained" if self._untrained else ""
        return f"GeneVocab({len(self.genes)} genes{left_out}, {len(self) - len(self.genes)} special tokens)"


def is_special(token: str) -> bool:
    """Whether `token` is no gene: it stands in angle brackets, as `<cls>` does."""
    return token.startswith("<") and token.endswith(">")


def _read_pairs(path: Path) -> list[tuple[str, Any]]:
    try:
        # pairs instead of a dict: a dict would hide a token that stands twice
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except FileNotFoundError:
        msg = f"there is no file {path}"
        raise input_error(msg, "a vocab.json", "give the path of the model's vocabulary") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is not JSON: {error}"
        raise input_error(msg, "one object from token to id", "give the model's own vocab.json") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        msg = f"{path} holds no object from token to id"
        raise input_error(msg, 'JSON like {"A1BG": 0, "A1CF": 1}', "give the model's own vocab.json")
    return pairs


def _check_ids(pairs: list[tuple[str, Any]], path: Path) -> None:
    expected, remedy = f"the ids 0 to {len(pairs) - 1}, each once", "give the model's own vocab.json; edited files do not fit its weights"
    odd = [f"{token!r}: {number!r}" for token, number in pairs if type(number) is not int]
    if odd:
        msg = f"{path} has {len(odd)} ids that are no whole numbers: {_some(odd)}"
        raise input_error(msg, expected, remedy)
    numbers = {number for _, number in pairs}
    gaps = sorted(set(range(len(pairs))) - numbers)
    if not gaps:
        return
    seen: dict[int, str] = {}
    doubles = [f"{seen[i]!r} and {token!r} are both {i}" for token, i in pairs if seen.setdefault(i, token) != token]
    outside = sorted(numbers - set(range(len(pairs))))
    what = [f"{len(gaps)} ids are missing: {_some(gaps)}"]
    what += [f"{len(outside)} lie outside: {_some(outside)}"] if outside else []
    what += [f"{len(doubles)} stand twice: {_some(doubles)}"] if doubles else []
    msg = f"{path} is no list of ids without gaps: " + "; ".join(what)
    raise input_error(msg, expected, remedy)


def _some(items: Sequence[object], limit: int = 5) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in all)"
