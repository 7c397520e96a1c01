"""What users do wrong, as one table: how to make it, the command, the words that must be in the one message that answers it.

Every issue adds its rows. `test_bad_inputs.py` runs each row inside a fresh folder and holds it to the same rules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix

from soma_experiments import write_experiment


@dataclass
class Kit:
    """What a row may use to make its files; the working folder holds `model/` and `cells.h5ad` already."""

    folder: Path
    adata: Callable[..., AnnData]

    def cells(self, change: Callable[[AnnData], AnnData | None] | None = None, **options: Any) -> None:
        """Write `cells.h5ad` after `change`, which edits the cells or returns others."""
        adata = self.adata(**options)
        changed = None if change is None else change(adata)
        (adata if changed is None else changed).write_h5ad(self.folder / "cells.h5ad")

    def experiment(self, change: Callable[[AnnData], None] | None = None, layer: str = "raw") -> None:
        """Write cells after `change` as a SOMA experiment `exp/`."""
        adata = self.adata()
        adata.obs["tissue"] = "blood"
        if change is not None:
            change(adata)
        write_experiment(adata, self.folder / "exp", layer)

    def tensors(self, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        """Change the weights of `model/`."""
        tensors = load_file(self.folder / "model" / "model.safetensors")
        change(tensors)
        save_file(tensors, self.folder / "model" / "model.safetensors")

    def vocabulary(self, change: Callable[[dict[str, int]], None]) -> None:
        """Change the vocabulary of `model/`."""
        path = self.folder / "model" / "vocab.json"
        ids = json.loads(path.read_text())
        change(ids)
        path.write_text(json.dumps(ids))


@dataclass(frozen=True)
class Row:
    """One mistake."""

    name: str
    argv: str
    words: tuple[str, ...]
    make: Callable[[Kit], object] = Kit.cells
    skip_root: bool = False
    needs: str | None = None
    """An optional package."""


EMBED = "embed cells.h5ad --model model --out out.h5ad"


def _set_values(value: float) -> Callable[[Kit], None]:
    def change(adata: AnnData) -> None:
        dense = adata.X.toarray()
        dense[3, 5] = value
        adata.X = csr_matrix(dense)

    return lambda kit: kit.cells(change)


def _rename(adata: AnnData, names: list[str]) -> None:
    adata.var_names = names


def _truncate(kit: Kit) -> None:
    data = (kit.folder / "cells.h5ad").read_bytes()
    (kit.folder / "cells.h5ad").write_bytes(data[: len(data) // 2])


def _scale(adata: AnnData) -> None:
    dense = adata.X.toarray()
    adata.X = ((dense - dense.mean(0)) / (dense.std(0) + 1e-3)).astype(np.float32)


def _drop(name: str) -> Callable[[Kit], None]:
    return lambda kit: kit.tensors(lambda tensors: tensors.pop(name))


def _no_write(kit: Kit) -> None:
    (kit.folder / "closed").mkdir()
    (kit.folder / "closed").chmod(0o500)


CELLS = [
    Row("missing file", "embed nowhere.h5ad --model model --out out.h5ad", ("nowhere.h5ad",)),
    Row("missing file for inspect", "inspect nowhere.h5ad", ("nowhere.h5ad",)),
    Row("truncated h5ad", EMBED, ("cells.h5ad", "truncated"), _truncate),
    Row("truncated h5ad for inspect", "inspect cells.h5ad", ("cells.h5ad", "truncated"), _truncate),
    Row(
        "a text file with the name of an h5ad",
        EMBED,
        ("cells.h5ad",),
        lambda kit: (kit.folder / "cells.h5ad").write_text("cell,gene\n1,2\n"),
    ),
    Row("an empty file", EMBED, ("cells.h5ad",), lambda kit: (kit.folder / "cells.h5ad").write_bytes(b"")),
    Row(
        "a file of another kind",
        "embed cells.xlsx --model model --out out.h5ad",
        ("cells.xlsx",),
        lambda kit: (kit.folder / "cells.xlsx").write_bytes(b"PK"),
    ),
    Row("no overlap in genes", EMBED, ("gene", "%"), lambda kit: kit.cells(lambda a: _rename(a, [f"locus_{i}" for i in range(a.n_vars)]))),
    Row("gene names are positions", EMBED, ("gene",), lambda kit: kit.cells(lambda a: _rename(a, [str(i) for i in range(a.n_vars)]))),
    Row("negative values", EMBED, ("negative",), _set_values(-1.0)),
    Row("scaled values", EMBED, ("negative",), lambda kit: kit.cells(_scale)),
    Row("NaN values", EMBED, ("NaN",), _set_values(np.nan)),
    Row("infinite values", EMBED, ("inf",), _set_values(np.inf)),
    Row("zero cells", EMBED, ("no cells",), lambda kit: kit.cells(lambda a: a[:0].copy())),
    Row("empty cells are refused by choice", EMBED + " --empty error", ("2 cells", "cell3"), lambda kit: kit.cells(_blank)),
    Row("no such gene_key", EMBED + " --gene_key gene_simbol", ("gene_simbol", "gene_symbol"), lambda kit: kit.cells(_with_column)),
    Row("no such layer", EMBED + " --layer count", ("'count'", "counts"), lambda kit: kit.cells(_with_layer)),
]


def _blank(adata: AnnData) -> None:
    dense = adata.X.toarray()
    dense[[3, 7]] = 0
    adata.X = csr_matrix(dense)
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]


def _with_column(adata: AnnData) -> None:
    adata.var["gene_symbol"] = adata.var_names


def _with_layer(adata: AnnData) -> None:
    adata.layers["counts"] = adata.X


def _reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["encoder.value.out.bias"] = np.zeros(7, np.float32)


def _add(tensors: dict[str, np.ndarray]) -> None:
    tensors["encoder.value.extra"] = np.zeros(7, np.float32)


def _poison(tensors: dict[str, np.ndarray]) -> None:
    tensors["encoder.value.out.bias"][0] = np.nan


def _gap(ids: dict[str, int]) -> None:
    ids[max(ids, key=ids.__getitem__)] += 5


def _double(ids: dict[str, int]) -> None:
    first, second = list(ids)[:2]
    ids[second] = ids[first]


def _unknown_setting(kit: Kit) -> None:
    path = kit.folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))


def _settings(part: str, **changes: Any) -> Callable[[Kit], None]:
    """Change settings in one part of `config.json`; None takes one away."""

    def make(kit: Kit) -> None:
        path = kit.folder / "model" / "config.json"
        config = json.loads(path.read_text())
        config[part] = {name: value for name, value in (config[part] | changes).items() if value is not None}
        path.write_text(json.dumps(config))

    return make


def _batch_model(kit: Kit) -> None:
    _settings("model", batch_context=True, n_batches=2)(kit)
    named = {"encoder.batch.weight": 2, "encoder.batch_norm.weight": 0, "encoder.batch_norm.bias": 0}
    kit.tensors(lambda tensors: tensors.update({name: np.ones((rows, 32) if rows else 32, np.float32) for name, rows in named.items()}))


def _readme(kit: Kit) -> None:
    (kit.folder / "project").mkdir()
    (kit.folder / "project" / "README.md").write_text("my project")


class Payload:
    """Unpickled, it writes a file: the sign that foreign code ran."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch owned",))


def _authors(kit: Kit, state: object, **settings: Any) -> None:
    """Write a folder `theirs/` in the authors' form."""
    import torch

    folder = kit.folder / "theirs"
    folder.mkdir()
    sizes = {"embsize": 16, "nheads": 2, "d_hid": 16, "nlayers": 1, "n_layers_cls": 3, "pad_token": "<pad>", "pad_value": -2}
    (folder / "args.json").write_text(json.dumps(sizes | settings))
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "<cls>": 1, "<eoc>": 2, "TP53": 3}))
    torch.save(state, folder / "best_model.pt")


MODELS = [
    Row("missing model", "embed cells.h5ad --model nowhere --out out.h5ad", ("nowhere",)),
    Row(
        "a folder that is no model", "embed cells.h5ad --model empty --out out.h5ad", ("empty",), lambda kit: (kit.folder / "empty").mkdir()
    ),
    Row("missing tensor", EMBED, ("encoder.value.out.bias", "missing"), _drop("encoder.value.out.bias")),
    Row("extra tensor", EMBED, ("encoder.value.extra",), lambda kit: kit.tensors(_add)),
    Row("misshaped tensor", EMBED, ("encoder.value.out.bias", "7"), lambda kit: kit.tensors(_reshape)),
    Row("NaN tensor", EMBED, ("encoder.value.out.bias", "not finite"), lambda kit: kit.tensors(_poison)),
    Row("truncated weights", EMBED, ("model.safetensors",), lambda kit: os.truncate(kit.folder / "model" / "model.safetensors", 999)),
    Row("vocabulary with a gap", EMBED, ("vocab.json",), lambda kit: kit.vocabulary(_gap)),
    Row("vocabulary with an id twice", EMBED, ("vocab.json",), lambda kit: kit.vocabulary(_double)),
    Row("vocabulary that is no JSON", EMBED, ("vocab.json",), lambda kit: (kit.folder / "model" / "vocab.json").write_text("{")),
    Row("settings with an unknown name", EMBED, ("config.json", "colour"), _unknown_setting),
    Row("settings with a name less", EMBED, ("config.json", "lacks model.project_asked"), _settings("model", project_asked=None)),
    Row("a network larger than the disk", EMBED, ("model.safetensors", "ff_width"), _settings("model", ff_width=10**13)),
    Row("settings that are no JSON", EMBED, ("config.json",), lambda kit: (kit.folder / "model" / "config.json").write_text("{")),
    Row(
        "malicious pickle",
        "convert theirs --out ours",
        ("best_model.pt",),
        lambda kit: _authors(kit, {"encoder.embedding.weight": Payload()}),
    ),
    Row("malicious pickle for inspect", "inspect theirs", ("best_model.pt",), lambda kit: _authors(kit, Payload())),
    Row("a model for the authors that they cannot express", "convert model --to_authors --drop nothing --out theirs", ("nothing",)),
    Row("authors' folder without tensors", "convert theirs --out ours", ("encoder.embedding.weight",), lambda kit: _authors(kit, {})),
]

WORDS = [
    Row("unknown command", "embde cells.h5ad", ("embde", "did you mean embed")),
    Row("unknown option", EMBED + " --gene_kye symbol", ("--gene_kye", "did you mean --gene_key")),
    Row("no words", "embed", ("FILE", "--out")),
    Row("no output", "embed cells.h5ad --model model", ("--out",)),
    Row("option without a value", "embed cells.h5ad --model model --out", ("--out",)),
    Row("one word too many", "embed cells.h5ad more.h5ad --model model --out out.h5ad", ("more.h5ad",)),
    Row("a choice that does not exist", EMBED + " --empty keep", ("--empty", "keep", "nan")),
    Row("a length that holds no gene", EMBED + " --max_length 1", ("max_length", "1")),
    Row("no threads", EMBED + " --threads 0", ("threads", "0")),
    Row("a device that is not there", EMBED + " --device abacus", ("abacus",)),
    Row("a key that would be a folder", EMBED + " --key_added X/mine", ("X/mine",)),
    Row("a table of orthologs that does not exist", EMBED + " --orthologs mouse.tsv", ("mouse.tsv",)),
    Row("a recipe that does not exist", EMBED + " --config recipe.yaml", ("recipe.yaml",)),
    Row(
        "a recipe with an unknown name",
        EMBED + " --config r.yaml",
        ("colour",),
        lambda kit: (kit.folder / "r.yaml").write_text("colour: blue\n"),
    ),
    Row("a recipe that is no YAML", EMBED + " --config r.yaml", ("r.yaml",), lambda kit: (kit.folder / "r.yaml").write_text("a: [1,\nb")),
]

PLACES = [
    Row("output below a regular file", "embed cells.h5ad --model model --out cells.h5ad/out.h5ad", ("cells.h5ad",)),
    Row("output in a folder that does not exist", "embed cells.h5ad --model model --out nowhere/out.h5ad", ("nowhere",)),
    Row("output in a place nobody may write", "embed cells.h5ad --model model --out /proc/out.h5ad", ("/proc",)),
    Row(
        "read-only output folder",
        "embed cells.h5ad --model model --out closed/out.h5ad",
        ("closed", "permission"),
        _no_write,
        skip_root=True,
    ),
    Row("output is a folder", "embed cells.h5ad --model model --out model", ("model",)),
    Row("output is the input", "embed cells.h5ad --model model --out cells.h5ad", ("cells.h5ad",)),
    Row("model below a regular file", "convert model --out cells.h5ad/ours", ("cells.h5ad",)),
    Row("model in a place nobody may write", "convert model --out /proc/ours", ("/proc",)),
    Row("model over a README.md of one's own", "convert model --out project", ("README.md",), _readme),
    Row("model over other files", "convert model --out .", ("cells.h5ad",)),
]


def _soma(name: str, argv: str, words: tuple[str, ...], make: Callable[[Kit], object] = Kit.experiment) -> Row:
    return Row(name, f"prepare {argv} --out store", words, make, needs="tiledbsoma")


def _negative(adata: AnnData) -> None:
    dense = adata.X.toarray()
    dense[3, 5] = -1
    adata.X = csr_matrix(dense)


def _store(kit: Kit) -> None:
    from annformer.data.store_writer import write_store

    write_store([kit.folder / "cells.h5ad"], kit.folder / "store")


def _no_manifest(kit: Kit) -> None:
    (kit.folder / "model" / "manifest.json").write_text("{")


EXPERIMENTS = [
    _soma("no experiment at the address", "file:///nowhere/exp", ("no TileDB-SOMA experiment", "file:///nowhere/exp"), Kit.cells),
    _soma("a filter that is no condition", "exp --obs_filter 'tissue = \"blood\"'", ("tissue = ", "cannot be used", "batch, cell_type")),
    _soma("a filter on an unknown column", "exp --obs_filter 'tisue == \"blood\"'", ("tisue does not exist", "cell_type, tissue")),
    _soma("a filter that no cell fulfils", "exp --obs_filter 'tissue == \"Blood\"'", ("no cell of exp", "Blood")),
    _soma("a filter for files", "cells.h5ad --obs_filter 'tissue == \"blood\"'", ("no input is a SOMA experiment",), Kit.cells),
    _soma("an experiment without the layer", "exp", ("no layer 'raw'", "'data'"), lambda kit: kit.experiment(layer="data")),
    _soma("an experiment with a negative value", "exp", ("no raw counts", "down to -1"), lambda kit: kit.experiment(_negative)),
    _soma("a part of an experiment", "exp/ms/RNA", ("SOMA Measurement, not an experiment",)),
]

STORES = [
    Row("a store that is not there", "pretrain nowhere --out run", ("nowhere is not a store", "annformer prepare")),
    Row("cells instead of a store", "pretrain cells.h5ad --out run", ("cells.h5ad is not a store", "annformer prepare")),
    Row("a model instead of a store", "pretrain model --out run", ("model is not a store", "annformer prepare")),
    Row(
        "a norm that several processes would compute each for itself",
        "pretrain store --out run --set model.input_norm=batch --devices 2 --accelerator cpu",
        ("input_norm is 'batch' and 2 processes", "one process"),
        _store,
    ),
    Row("no node to pretrain on", "pretrain store --plan --nodes 0", ("nodes", "greater than or equal to 1"), _store),
    Row("a price below nothing", "pretrain store --plan --price_per_hour -2", ("--price_per_hour -2", "0 or more"), _store),
    Row("a seed below nothing", "prepare cells.h5ad --out store --seed -1", ("seed is -1", "from 0 on")),
    Row("a label column that nothing has", "prepare cells.h5ad --out store --columns cel_type", ("'cel_type'", "cell_type")),
    Row("a store that is no JSON", "pretrain model --out run", ("manifest.json is not JSON",), _no_manifest),
]


# annformer compare
def _small_batch(adata: AnnData) -> None:
    adata.obs["batch"] = ["b2"] * 3 + ["b0"] * (adata.n_obs - 33) + ["b1"] * 30


def _constant(adata: AnnData) -> None:
    adata.X = csr_matrix(np.ones(adata.shape, np.float32))


COMPARED = "compare integrate cells.h5ad --model model --out out"


def one_value(column: str, value: str) -> Callable[[Kit], None]:
    return lambda kit: kit.cells(lambda adata: adata.obs.__setitem__(column, value))


def no_batch(adata: AnnData) -> None:
    adata.obs["batch"] = adata.obs["batch"].astype(object)
    adata.obs.loc[adata.obs_names[4], "batch"] = None


def blank_batch(kit: Kit) -> None:
    """Write cells of which one has a batch without a name."""
    kit.cells(lambda adata: adata.obs.__setitem__("batch", [" " if n == 4 else str(name) for n, name in enumerate(adata.obs["batch"])]))


COMPARISONS = [
    Row(
        "an unknown task",
        "compare integrat cells.h5ad --batch_key batch --label_key cell_type --out out",
        ("integrat", "did you mean integrate"),
    ),
    Row("no batch_key", f"{COMPARED} --label_key cell_type", ("--batch_key",)),
    Row("a batch_key that is no column", f"{COMPARED} --batch_key bach --label_key cell_type", ("'bach'", "batch")),
    Row("a label_key that is no column", f"{COMPARED} --batch_key batch --label_key celltype", ("'celltype'", "cell_type")),
    Row("one batch", f"{COMPARED} --batch_key lane --label_key cell_type", ("one value, 'L1'", "two batches"), one_value("lane", "L1")),
    Row(
        "a cell without a batch",
        f"{COMPARED} --batch_key batch --label_key cell_type",
        ("no value in 1", "cell4"),
        lambda kit: kit.cells(no_batch),
    ),
    Row("a batch without a name", f"{COMPARED} --batch_key batch --label_key cell_type", ("no value in 1", "cell4"), blank_batch),
    Row("one type", f"{COMPARED} --batch_key batch --label_key kind", ("one type, 'T'", "two types"), one_value("kind", "T")),
    Row("no type at all", f"{COMPARED} --batch_key batch --label_key kind", ("no type at all",), one_value("kind", "unknown")),
    Row(
        "an unknown method",
        f"{COMPARED} --batch_key batch --label_key cell_type --methods zero-shot pca-hgv",
        ("'pca-hgv'", "did you mean PCA HVG"),
    ),
    Row("no baseline", f"{COMPARED} --batch_key batch --label_key cell_type --methods zero-shot", ("no baseline", "PCA HVG")),
    Row(
        "logarithms only",
        f"{COMPARED} --batch_key batch --label_key cell_type",
        ("no counts", "layers['counts']"),
        lambda kit: kit.cells(lambda adata: setattr(adata, "X", adata.X.log1p() * 0.9)),
    ),
    Row("no seed", f"{COMPARED} --batch_key batch --label_key cell_type --seeds 0", ("--seeds 0", "at least 1")),
    Row(
        "cells without columns",
        "compare integrate cells.txt --batch_key batch --label_key cell_type --out out",
        ("cells.txt",),
        lambda kit: (kit.folder / "cells.txt").write_text("1,2"),
    ),
]

ANNOTATED = "compare annotate cells.h5ad --model model --out out"


def _types_are_batches(adata: AnnData) -> None:
    adata.obs["batch"] = (adata.obs["cell_type"] == "B cell").map({True: "one", False: "two"})
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace("monocyte", "T cell")


COMPARISONS += [
    Row("no label_key to annotate", ANNOTATED, ("--label_key",)),
    Row("a label_key to annotate that is no column", f"{ANNOTATED} --label_key celltype", ("'celltype'", "cell_type")),
    Row("one type to annotate", f"{ANNOTATED} --label_key kind", ("one type, 'T'", "two types"), one_value("kind", "T")),
    Row(
        "names of cells for types",
        f"{ANNOTATED} --label_key name",
        ("60 values for 60 cells", "--label_key"),
        lambda kit: kit.cells(lambda adata: adata.obs.__setitem__("name", [f"c{n}" for n in range(adata.n_obs)])),
    ),
    Row(
        "one batch to hold out",
        f"{ANNOTATED} --label_key cell_type --batch_key lane",
        ("one value, 'L1'", "none can be held out"),
        one_value("lane", "L1"),
    ),
    Row(
        "batches that are types",
        f"{ANNOTATED} --label_key cell_type --batch_key batch",
        ("with one held out there is one type, 'T cell', to learn from", "leave it out"),
        lambda kit: kit.cells(_types_are_batches),
    ),
    Row(
        "an unknown method to annotate with",
        f"{ANNOTATED} --label_key cell_type --methods annformer knn-pac",
        ("'knn-pac'", "did you mean kNN PCA"),
    ),
    Row("no baseline to annotate with", f"{ANNOTATED} --label_key cell_type --methods annformer", ("no baseline", "kNN PCA")),
    Row(
        "an option of another task",
        f"{COMPARED} --batch_key batch --label_key cell_type --novelty true",
        ("integrate has no --novelty", "compare annotate"),
    ),
    Row(
        "a batch with 3 cells to compare",
        f"{COMPARED} --batch_key batch --label_key cell_type",
        ("very few cells", "'b2' 3"),
        lambda kit: kit.cells(_small_batch),
    ),
    Row(
        "no gene that varies to compare",
        f"{COMPARED} --batch_key batch --label_key cell_type",
        ("variable gene",),
        lambda kit: kit.cells(_constant),
    ),
    Row("a recipe to annotate that does not exist", f"{ANNOTATED} --label_key cell_type --recipe anotate", ("'anotate'", "annotate")),
]

# annformer integrate

INTEGRATED = "integrate cells.h5ad --model model --out out"


INTEGRATIONS = [
    Row("no batch_key to integrate by", INTEGRATED, ("--batch_key",)),
    Row("a batch_key that obs lacks", f"{INTEGRATED} --batch_key donor", ("'donor'", "batch")),
    Row("one batch to integrate", f"{INTEGRATED} --batch_key lane", ("one batch only, 'L1'", "at least two"), one_value("lane", "L1")),
    Row(
        "a batch with 3 cells",
        f"{INTEGRATED} --batch_key batch",
        ("very few cells: 'b2' 3", "at least 10"),
        lambda kit: kit.cells(_small_batch),
    ),
    Row(
        "a cell to integrate without a batch",
        f"{INTEGRATED} --batch_key batch",
        ("no value in 1", "cell4"),
        lambda kit: kit.cells(no_batch),
    ),
    Row("a batch to integrate without a name", f"{INTEGRATED} --batch_key batch", ("no value in 1", "cell4"), blank_batch),
    Row("no gene that varies", f"{INTEGRATED} --batch_key batch", ("0 variable genes",), lambda kit: kit.cells(_constant)),
    Row("no epoch to integrate for", f"{INTEGRATED} --batch_key batch --epochs 0", ("epochs", "greater than 0")),
    Row("fewer threads than one", f"{INTEGRATED} --batch_key batch --threads -1", ("threads is -1", "1 or more")),
    Row("a seed to integrate with below nothing", f"{INTEGRATED} --batch_key batch --seed -1", ("seed", "greater than or equal to 0")),
    Row(
        "no counts to integrate",
        f"{INTEGRATED} --batch_key batch",
        ("no counts", "layers['counts']"),
        lambda kit: kit.cells(lambda adata: setattr(adata, "X", adata.X.log1p() * 0.9)),
    ),
    Row("an unknown recipe", f"{INTEGRATED} --batch_key batch --recipe integrat", ("'integrat'", "integrate-original")),
    Row(
        "a recipe with a wrong setting",
        f"{INTEGRATED} --batch_key batch --recipe recipe.yaml",
        ("n_gens", "recipe.yaml"),
        lambda kit: (kit.cells(), (kit.folder / "recipe.yaml").write_text("n_gens: 5\n")),
    ),
    Row("one type to score by", f"{INTEGRATED} --batch_key batch --label_key kind", ("one type, 'T'",), one_value("kind", "T")),
    Row("a label_key that obs lacks", f"{INTEGRATED} --batch_key batch --label_key type", ("'type'", "cell_type")),
    Row("a corrected batch that is none", f"{INTEGRATED} --batch_key batch --epochs 0.1 --corrected b7", ("'b7'", "'b0'")),
]

ROWS = CELLS + MODELS + WORDS + PLACES + EXPERIMENTS + STORES + COMPARISONS + INTEGRATIONS

FINE = [
    Row(
        "duplicate genes are added up", EMBED, ("added",), lambda kit: kit.cells(lambda a: _rename(a, [*a.var_names[:-1], a.var_names[0]]))
    ),
    Row("empty cells get NaN", EMBED, ("2 cells", "cell3"), lambda kit: kit.cells(_blank)),
    Row("empty cells are left out by choice", EMBED + " --empty drop", ("2 cells", "cell3"), lambda kit: kit.cells(_blank)),
    Row("dashes instead of underscores", EMBED + " --key-added X_mine", ()),
    Row("a model that needs batches is a finding", "inspect cells.h5ad --model model", (), _batch_model),
    Row("problems are findings, not errors", "inspect cells.h5ad --model model", (), lambda kit: kit.cells(_scale)),
]
"""Odd, but answered with exit status 0 and, where there are words, a line that says what was assumed."""
