"""Checkpoints as files: where named ones come from, how the authors' are read without running code, how folders are written whole."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from annformer.errors import input_error
from annformer.vocab import GeneVocab

MODEL_FILES: Final = ("config.json", "vocab.json", "model.safetensors", "README.md")
"""What a model folder of ours holds."""
CORRECTION: Final = "correction.safetensors"
CLASSIFIER: Final = "classifier.safetensors"
PART_FILES: Final = (CORRECTION, CLASSIFIER)
"""What the folder of an integrated model, or of a classifier, holds beside them."""
AUTHORS_FILES: Final = ("args.json", "vocab.json", "best_model.pt")
"""What a checkpoint folder of the authors holds."""
STAMP: Final = ".verified.json"
"""File beside a named checkpoint: hash, size and time of change of each file when its hash was last found to be the right one."""
MODEL_ZOO: Final = "https://github.com/bowang-lab/scGPT#pretrained-scgpt-model-zoo"


class Checkpoint(NamedTuple):
    """A checkpoint that can be fetched: each file is pinned by its SHA-256."""

    about: str
    url: str
    files: Mapping[str, str]


CHECKPOINTS: Final[dict[str, Checkpoint]] = {
    "scgpt-human": Checkpoint(
        "scGPT whole-human, 33 million cells, 12 layers of 512: a byte-identical mirror of the authors' file",
        "https://huggingface.co/u-cellm/scGPT-whole-human/resolve/main/",
        {
            "args.json": "c18e075e018140cb8b2d9029387b9de26607a5ce6a8ccabd6ead70cd76b95d60",
            "vocab.json": "acca93d114ca62c3f0f50debbd23e8c87f0714f4737764454f6b2b13f2e8580f",
            "best_model.pt": "6cb5d451ab5c4b33eb673adbe4fddc61d2389df1b89b7651a9fe2e557572b922",
        },
    ),
}
SHIPPED: Final[dict[str, str]] = {
    "annformer-base": "pretrained on public cells of blood, tumours, brain and other tissues; its README.md says on which and how well",
}
"""Models that are part of the package, in the folder `models` beside this file: no network is needed."""
BY_HAND: Final[dict[str, str]] = {
    "scgpt-blood": "blood",
    "scgpt-brain": "brain",
    "scgpt-continual-pretrained": "continual pretrained",
    "scgpt-heart": "heart",
    "scgpt-kidney": "kidney",
    "scgpt-lung": "lung",
    "scgpt-pan-cancer": "pan-cancer",
}
"""The authors' other checkpoints, by their row in the model zoo: there is no source with known hashes, so a person fetches them."""


def known_names() -> list[str]:
    """Every name that stands for a model."""
    return [*SHIPPED, *CHECKPOINTS, *BY_HAND]


def shipped(name: str) -> Path:
    """Folder of a model that ships with the package.

    Raises
    ------
    InputError
        When this installation lacks it.
    """
    folder = Path(str(resources.files("annformer").joinpath("models", name)))
    if not folder.is_dir():
        found = f"the model {name}, which ships with annformer, is not in this installation: there is no folder {folder}"
        raise input_error(found, "annformer as it was packed", "install annformer again, or name another model")
    return folder


def cache_folder() -> Path:
    """Where named checkpoints are kept: `$ANNFORMER_CACHE`, or `annformer` in the platform's cache folder."""
    import pooch

    return Path(os.environ.get("ANNFORMER_CACHE") or pooch.os_cache("annformer")) / "checkpoints"


def fetch(name: str, *, progress: bool = False) -> Path:
    """Folder of a named checkpoint, downloaded on first use, and verified then and whenever its files have changed.

    Files that have arrived whole are not fetched again after an interruption; the folder appears when all are there.

    Parameters
    ----------
    name
        A name in `CHECKPOINTS` or `BY_HAND`.
    progress
        Show a bar per file on stderr.

    Raises
    ------
    InputError
        When a file cannot be fetched or has another hash than it should, or when a person has to fetch it.
    """
    folder = cache_folder() / name
    files = tuple(CHECKPOINTS[name].files) if name in CHECKPOINTS else AUTHORS_FILES
    if all((folder / file).is_file() for file in files):
        if name in CHECKPOINTS:
            _verify(folder, CHECKPOINTS[name].files)
        return folder
    if name in BY_HAND:
        missing = f"the checkpoint {name} is not on this machine, and annformer knows no verified place to fetch it from"
        raise input_error(
            missing,
            f"{', '.join(AUTHORS_FILES)} in {folder}",
            f"download the row {BY_HAND[name]!r} of {MODEL_ZOO} and put the three files there; then this name works",
        )
    partial = folder.with_name(f"{name}.partial")
    for file, sha256 in CHECKPOINTS[name].files.items():
        _download(CHECKPOINTS[name].url + file, partial / file, sha256, progress=progress)
    try:
        partial.replace(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    _verify(folder, CHECKPOINTS[name].files)
    return folder


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    """Hash the files, unless the stamp says that these very files were hashed before."""
    states = {file: (folder / file).stat() for file in files}
    now = {file: [sha256, states[file].st_size, states[file].st_mtime_ns] for file, sha256 in files.items()}
    with suppress(OSError, ValueError):  # no stamp, or a damaged one
        if json.loads((folder / STAMP).read_bytes()) == now:
            return
    for file, sha256 in files.items():
        with (folder / file).open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != sha256:
            found = f"{folder / file} is not the file that annformer knows: it has SHA-256 {digest}"
            remedy = f"delete {folder}, and it is fetched again; a file of your own loads from a folder elsewhere, given by its path"
            raise input_error(found, f"SHA-256 {sha256}", remedy)
    with suppress(OSError):  # a cache that may only be read is hashed every time
        fresh = folder / f"{STAMP}.{os.getpid()}"
        fresh.write_text(json.dumps(now), encoding="utf-8")
        fresh.replace(folder / STAMP)


def _download(url: str, path: Path, sha256: str, *, progress: bool) -> None:
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=progress, timeout=60)
    try:
        pooch.retrieve(url, f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=downloader)
    except OSError as error:  # no connection, no such file there, no space here
        found = f"{url} cannot be fetched: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        remedy = f"try again with a connection, or put the files into {path.parent.with_suffix('')} by hand"
        raise input_error(found, "a connection to the server and a cache folder that can be written", remedy) from None
    except ValueError as error:  # how pooch reports a wrong hash
        shutil.rmtree(path.parent, ignore_errors=True)
        found = f"{url} is not the file that annformer knows: {str(error).splitlines()[0][:300]}"
        raise input_error(found, f"SHA-256 {sha256}", "nothing was kept; report it if it happens again") from None


def fetch_from_hub(repository: str, *, endpoint: str | None = None) -> Path:
    """Folder of a model in our format on the Hugging Face Hub, in its own cache.

    Parameters
    ----------
    repository
        `org/name`, or `org/name@revision`.
    endpoint
        Another server than the Hub.

    Raises
    ------
    InputError
        When there is no such repository or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(MODEL_FILES), endpoint=endpoint))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        beside, remedy = _beside(Path(name))
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        found = f"{repository!r} is no folder here{beside}; the Hugging Face Hub was tried too, and it cannot be fetched there: {reason}"
        known = f"a model folder, a repository with {', '.join(MODEL_FILES)}, or one of {', '.join(known_names())}"
        raise input_error(found, known, remedy) from None


def _beside(path: Path) -> tuple[str, str]:
    """What stands where the folder `path` was looked for, and what to do when it is on no server either."""
    if not path.parent.is_dir():
        return "", "check the spelling and the connection"
    there = sorted(inner.name for inner in path.parent.iterdir() if inner.is_dir())
    holds = f" ({path.parent} holds {', '.join(there[:5]) or 'no folder'}{', ...' if len(there) > 5 else ''})"
    near = [str(path.parent / close) for close in difflib.get_close_matches(path.name, there)]
    return holds, f"did you mean {', '.join(near)}" if near else "check the path, or the spelling and the connection"


def read_authors(folder: Path) -> tuple[dict[str, Any], GeneVocab, dict[str, Tensor]]:
    """Arguments, vocabulary (special tokens appended where missing) and tensors of a checkpoint folder of the authors."""
    require_files(folder, AUTHORS_FILES)
    return (
        read_json(folder / "args.json"),
        GeneVocab.from_json(folder / "vocab.json").with_specials(),
        read_tensors(folder / "best_model.pt"),
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of `torch.save` that holds nothing but named tensors.

    Raises
    ------
    InputError
        When it holds anything else, which is never run, or is damaged.
    """
    expected = "a state_dict: named tensors, nothing else (code in such a file is never run)"
    remedy = "fetch the file again, or write it with torch.save(model.state_dict(), path)"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        found = f"{path} cannot be read as tensors: {reason}"
        raise input_error(found, expected, remedy) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        found = f"{path} holds a {type(loaded).__name__}"
        raise input_error(found, expected, remedy)
    if others := [f"{key} ({type(value).__name__})" for key, value in loaded.items() if not isinstance(value, Tensor)]:
        found = f"{path} holds entries that are no tensors: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}"
        raise input_error(found, expected, remedy)
    return dict(loaded)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        found = f"{path} cannot be read as JSON: {error}"
        raise input_error(found, "a JSON object", "use the file as it was written") from None
    if not isinstance(values, dict):
        found = f"{path} holds a {type(values).__name__}"
        raise input_error(found, "a JSON object", "use the file as it was written")
    return values


def require_files(folder: Path, files: Collection[str]) -> None:
    """Raise InputError unless all `files` are in `folder`."""
    if missing := [file for file in files if not (folder / file).is_file()]:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        found = f"{folder} lacks {', '.join(missing)}; it holds {there}"
        raise input_error(found, f"{', '.join(files)}", "give the folder of a model, complete")


def write_authors(folder: Path, args: Mapping[str, Any], vocab: GeneVocab, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint folder as the authors' code reads it."""

    def fill(fresh: Path) -> None:
        (fresh / "args.json").write_text(json.dumps(args, indent=2) + "\n", encoding="utf-8")
        vocab.to_json(fresh / "vocab.json")
        torch.save(dict(weights), fresh / "best_model.pt")

    write_folder(folder, AUTHORS_FILES, fill)


def write_folder(folder: Path, known: Sequence[str], fill: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all: `fill` a new one beside it, flush it to the disk, put it in place.

    Parameters
    ----------
    known
        Files that may be replaced: a folder that holds anything else is left alone, and so is one without the first of them, because the
        others have names that a folder of the user's may hold as well.
    fill
        Writes the files into the folder it is given.

    Raises
    ------
    InputError
        When something else stands there, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        found = f"{folder} is a file"
        raise input_error(found, "a folder to write to", "give another path")
    there = {path.name for path in folder.glob("*")}
    if others := sorted(there.difference(known) if known[0] in there else there):
        found = f"{folder} holds {', '.join(others[:5])}, which annformer did not write"
        raise input_error(found, "a new or empty folder, or a model to replace", "give another path")
    fresh = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        fill(fresh)
        fresh.chmod(0o755)
        for path in fresh.iterdir():
            if path.is_file():
                path.chmod(0o644)  # safetensors makes files that nobody else may read
        for path in (*fresh.iterdir(), fresh):
            to_disk(path)
        _swap(fresh, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors have their own words for a full disk
        found = f"{folder} cannot be written: {error}"
        raise input_error(
            found, "a folder one may write to, with space", "free space or give another path; nothing was left behind"
        ) from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _swap(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.replace(folder)
        return
    old = fresh.with_suffix(".old")  # a folder with files in it cannot be replaced in one step
    folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
