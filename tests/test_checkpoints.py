"""Named checkpoints from a local server, the authors' files, folders written whole or not at all."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad

from annformer import checkpoints
from annformer.cli import COMMANDS, SUBCOMMANDS, main
from annformer.errors import AnnformerWarning, InputError
from annformer.scgpt import DEFAULT_MODEL, ScGPT, is_checkpoint_name
from annformer.tasks.embedding import embed, embed_file
from annformer.vocab import GeneVocab

GOLDEN = Path(__file__).parent / "golden/a_pretrain"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves `files` by path and counts what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.answer()
        self.wfile.write(content)

    def answer(self) -> bytes:
        content = self.server.files.get(self.path.split("?")[0])
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.end_headers()
        return content or b""

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANNFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/checkpoints"


@pytest.fixture
def tiny(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint named `tiny` on the server; the folder it will stand in."""
    contents = {name: (GOLDEN / name).read_bytes() for name in checkpoints.AUTHORS_FILES}
    server.files = {f"/tiny/{name}": content for name, content in contents.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "tiny", checkpoints.Checkpoint("for tests", f"{server.url}/tiny/", hashes))
    return cache / "tiny"


def test_fetched_once_and_loaded_by_name(tiny: Path, server: Server) -> None:
    model = ScGPT.from_pretrained("tiny")
    assert model.name == "tiny"
    assert model.fingerprint == ScGPT.from_pretrained(GOLDEN).fingerprint
    assert sorted(server.asked) == sorted(server.files)
    assert checkpoints.fetch("tiny") == tiny
    assert len(server.asked) == 3
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    names: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (names.append(Path(file.name).name), digest(file, kind))[1])
    return names


def test_files_in_the_cache_are_hashed_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = hashed(monkeypatch)
    tiny.mkdir(parents=True)
    for name in checkpoints.AUTHORS_FILES:
        (tiny / name).write_bytes((GOLDEN / name).read_bytes())
    checkpoints.fetch("tiny")
    assert sorted(names) == sorted(checkpoints.AUTHORS_FILES)
    names.clear()
    checkpoints.fetch("tiny")
    assert names == []
    os.utime(tiny / "vocab.json")
    checkpoints.fetch("tiny")
    assert sorted(names) == sorted(checkpoints.AUTHORS_FILES)


def test_changed_file_in_the_cache_is_refused(tiny: Path) -> None:
    checkpoints.fetch("tiny")
    right = (tiny / "args.json").read_bytes()
    (tiny / "args.json").write_bytes(right.replace(b'"nheads": 4', b'"nheads": 8'))
    with pytest.raises(InputError) as caught:
        ScGPT.from_pretrained("tiny")
    for words in (
        str(tiny / "args.json"),
        hashlib.sha256((tiny / "args.json").read_bytes()).hexdigest(),
        hashlib.sha256(right).hexdigest(),
    ):
        assert words in str(caught.value)
    assert (tiny / "args.json").exists()


def test_damaged_stamp_means_hashing_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.fetch("tiny")
    (tiny / checkpoints.STAMP).write_text("{")
    names = hashed(monkeypatch)
    checkpoints.fetch("tiny")
    assert len(names) == 3


def test_wrong_hash_is_refused_and_nothing_stays(tiny: Path, server: Server) -> None:
    server.files["/tiny/best_model.pt"] += b"one byte more"
    with pytest.raises(InputError, match=r"best_model.pt is not the file that annformer knows"):
        checkpoints.fetch("tiny")
    assert list(tiny.parent.iterdir()) == []


def test_interrupted_download_continues(tiny: Path, server: Server) -> None:
    content = server.files.pop("/tiny/best_model.pt")
    with pytest.raises(InputError, match="cannot be fetched"):
        checkpoints.fetch("tiny")
    assert not tiny.exists()
    server.files["/tiny/best_model.pt"] = content
    server.asked.clear()
    checkpoints.fetch("tiny")
    assert server.asked == ["/tiny/best_model.pt"]


def test_offline_is_one_message(tiny: Path, server: Server) -> None:
    server.server_close()
    server.shutdown()
    with pytest.raises(InputError, match=r"cannot be fetched.*\n.*\n.*by hand") as caught:
        checkpoints.fetch("tiny")
    assert str(tiny) in str(caught.value)


def test_every_pin_is_a_sha256() -> None:
    for checkpoint in checkpoints.CHECKPOINTS.values():
        assert set(checkpoint.files) == set(checkpoints.AUTHORS_FILES)
        assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in checkpoint.files.values())
        assert checkpoint.url.startswith("https://")


def test_other_checkpoints_are_put_by_hand(cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        ScGPT.from_pretrained("scgpt-blood")
    assert checkpoints.MODEL_ZOO in str(caught.value)
    folder = cache / "scgpt-blood"
    assert str(folder) in str(caught.value)
    folder.mkdir(parents=True)
    for name in checkpoints.AUTHORS_FILES:
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    assert ScGPT.from_pretrained("scgpt-blood").name == "scgpt-blood"


def test_cache_is_the_platforms_without_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANNFORMER_CACHE", raising=False)
    assert checkpoints.cache_folder().parts[-2:] == ("annformer", "checkpoints")


def test_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: ScGPT) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tiny_model.save_pretrained(tmp_path / "model")
    names = [path.name for path in (tmp_path / "model").iterdir()]
    everything = [*names, "weights.pkl"]
    answer = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in everything]}).encode()
    tree = json.dumps([{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in everything]).encode()
    server.files = {f"/api/models/some/model/revision/{revision}": answer for revision in ("main", "v1")}
    server.files[f"/api/models/some/model/tree/{COMMIT}"] = tree
    server.files |= {f"/some/model/resolve/{COMMIT}/{name}": (tmp_path / "model" / name).read_bytes() for name in names}
    for name in ("some/model", "some/model@v1"):
        folder = checkpoints.fetch_from_hub(name, endpoint=server.url)
        assert ScGPT.from_pretrained(folder).fingerprint == tiny_model.fingerprint
    assert not [path for path in server.asked if "pkl" in path]
    with pytest.raises(InputError, match="'no/such' is no folder here; the Hugging Face Hub was tried"):
        checkpoints.fetch_from_hub("no/such", endpoint=server.url)


def test_hub_offline_is_one_message(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    server.server_close()
    server.shutdown()
    with pytest.raises(InputError, match=r"'some/model' is no folder here.*\n.*\n.*connection"):
        checkpoints.fetch_from_hub("some/model", endpoint=server.url)


def test_mistyped_folder_is_looked_for_here_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine-1", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        checkpoints.fetch_from_hub("models/mine", endpoint=server.url)
    assert str(caught.value).startswith("'models/mine' is no folder here (models holds mine-1, other); the Hugging Face Hub was tried")
    assert "did you mean models/mine-1" in str(caught.value)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["torch.save", "pickle"])
def test_malicious_pickle_does_not_run(tmp_path: Path, write: object) -> None:
    mark = tmp_path / "it ran".replace(" ", "_")
    write({"encoder.embedding.weight": Malicious(mark)}, tmp_path / "best_model.pt")  # type: ignore[operator]
    with pytest.raises(InputError, match="cannot be read as tensors"):
        checkpoints.read_tensors(tmp_path / "best_model.pt")
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    content = (GOLDEN / "best_model.pt").read_bytes()
    (tmp_path / "best_model.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="cannot be read as tensors"):
        checkpoints.read_tensors(tmp_path / "best_model.pt")


def test_old_torch_format_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.read_tensors(tmp_path / "old.pt")["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_state_dict": {"a": torch.zeros(1)}, "epoch": 3}, r"no tensors: model_state_dict \(dict\), epoch \(int\)"),
        ([torch.zeros(1)], "holds a list"),
        ({3: torch.zeros(1)}, "holds a dict"),
    ],
)
def test_only_named_tensors(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "best_model.pt")
    with pytest.raises(InputError, match=words):
        checkpoints.read_tensors(tmp_path / "best_model.pt")


@pytest.mark.parametrize(("text", "words"), [("[1, 2]", "holds a list"), ("{", "cannot be read as JSON")])
def test_args_must_be_an_object(tmp_path: Path, text: str, words: str) -> None:
    for name in checkpoints.AUTHORS_FILES:
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(InputError, match=words):
        checkpoints.read_authors(tmp_path)


def test_incomplete_folder_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(InputError, match=r"lacks vocab.json, best_model.pt; it holds args.json"):
        checkpoints.read_authors(tmp_path)


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("new")


def test_folder_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep/model"
    checkpoints.write_folder(target, ["config.json", "old.json"], fill)
    (target / "old.json").touch()
    checkpoints.write_folder(target, ["config.json", "old.json"], fill)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_foreign_folder_and_file_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds chapter.tex, which annformer did not write"):
        checkpoints.write_folder(tmp_path / "thesis", ["config.json"], fill)
    with pytest.raises(InputError, match="is a file"):
        checkpoints.write_folder(tmp_path / "thesis/chapter.tex", ["config.json"], fill)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize("name", ["README.md", "vocab.json"])
def test_file_of_the_user_with_a_name_of_ours_is_left_alone(tmp_path: Path, tiny_model: ScGPT, name: str) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which annformer did not write"):
        tiny_model.save_pretrained(tmp_path / "project")
    if name == "vocab.json":
        with pytest.raises(InputError, match=f"holds {name}, which annformer did not write"):
            tiny_model.save_for_authors(tmp_path / "project", drop=["asked"])
    assert (tmp_path / "project" / name).read_text() == "mine"


def test_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    checkpoints.write_folder(tmp_path / "model", ["config.json"], fill)

    def fails(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device.*\n.*\n.*nothing was left behind"):
        checkpoints.write_folder(tmp_path / "model", ["config.json"], fails)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/config.json").read_text() == "new"


@pytest.fixture
def ships(tiny_model: ScGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands where the package's own models are; the working folder is another one."""
    (tmp_path / "package").mkdir()
    (tmp_path / "here").mkdir()
    tiny_model.save_pretrained(tmp_path / "package/models/annformer-base")
    files = checkpoints.resources.files
    monkeypatch.setattr(checkpoints.resources, "files", lambda name: tmp_path / "package" if name == "annformer" else files(name))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package/models/annformer-base"


def test_a_shipped_model_needs_no_network(ships: Path, tiny_model: ScGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    assert ScGPT.from_pretrained("annformer-base").fingerprint == tiny_model.fingerprint
    assert is_checkpoint_name("annformer-base")


def test_a_shipped_name_means_the_shipped_model(ships: Path, tiny_vocab: GeneVocab, tiny_model: ScGPT) -> None:
    other = ScGPT(tiny_model.config, tiny_vocab)
    other.save_pretrained("annformer-base")
    with pytest.warns(AnnformerWarning, match=r"ships with annformer; to take the folder .* say './annformer-base'"):
        assert ScGPT.from_pretrained("annformer-base").fingerprint == tiny_model.fingerprint
    for own in ("./annformer-base", Path("annformer-base")):
        assert ScGPT.from_pretrained(own).fingerprint == other.fingerprint


def test_an_installation_without_the_model_says_so(ships: Path) -> None:
    shutil.rmtree(ships)
    with pytest.raises(
        InputError, match=r"annformer-base, which ships with annformer, is not in this installation.*\n.*\n.*install annformer"
    ):
        ScGPT.from_pretrained("annformer-base")


def test_the_shipped_model_is_the_default_everywhere(ships: Path, tiny_adata: Callable[..., AnnData], tiny_model: ScGPT) -> None:
    adata = tiny_adata()
    adata.write_h5ad("in.h5ad")
    embed(adata, progress=False)
    record = embed_file("in.h5ad", "out.h5ad", progress=False)
    assert record["fingerprint"] == adata.uns["annformer"]["X_annformer"]["fingerprint"] == tiny_model.fingerprint
    assert main(["embed", "in.h5ad", "--out", "cli.h5ad", "--quiet"]) == 0
    assert read_h5ad("cli.h5ad").uns["annformer"]["X_annformer"]["fingerprint"] == tiny_model.fingerprint


def test_commands_name_the_same_default() -> None:
    defaults = {}
    for name in COMMANDS:
        for inner in SUBCOMMANDS.get(name, ["command"] if name != "version" else []):
            parameters = inspect.signature(getattr(import_module(f"annformer.cli.{name}"), inner)).parameters
            if "model" in parameters and parameters["model"].default is not inspect.Parameter.empty:
                defaults[f"{name} {inner}"] = parameters["model"].default
    assert set(defaults) >= {"demo command", "embed command", "inspect command", "annotate fit", "map fit"}
    assert set(defaults.values()) == {DEFAULT_MODEL}


# what really ships: these fail, and should, in a tree without the weights


@pytest.fixture(scope="module")
def base() -> Path:
    return checkpoints.shipped(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def loaded(base: Path) -> ScGPT:
    return ScGPT.from_pretrained(DEFAULT_MODEL)


def test_every_name_has_its_folder_and_every_folder_its_name() -> None:
    assert sorted(path.name for path in checkpoints.shipped(DEFAULT_MODEL).parent.iterdir()) == sorted(checkpoints.SHIPPED)


def test_the_shipped_folder_is_complete_and_small(base: Path) -> None:
    assert {path.name for path in base.iterdir()} == set(checkpoints.MODEL_FILES)
    assert (base / "model.safetensors").stat().st_size <= 15e6


def test_the_shipped_model_embeds(loaded: ScGPT, tiny_adata: Callable[..., AnnData]) -> None:
    assert loaded.name == DEFAULT_MODEL
    adata = tiny_adata()
    embed(adata, loaded, progress=False)
    assert np.isfinite(adata.obsm["X_annformer"]).all()


def test_the_shipped_model_marks_what_it_has_not_learned(loaded: ScGPT) -> None:
    assert 0 < len(loaded.vocab.untrained) < len(loaded.vocab.genes) / 2
    assert not loaded.vocab.untrained & {"CD3D", "CD79A", "LYZ", "NKG7", "HLA-A", "HLA-DRA"}


def test_the_shipped_model_is_better_than_the_gene_means(loaded: ScGPT) -> None:
    errors = loaded.config.provenance.get("held_out_squared_error")
    if errors is not None:
        assert isinstance(errors, dict)
        assert 0 < errors["gep"] < errors["gene mean"]


def test_the_shipped_card_names_data_and_licences(base: Path) -> None:
    card = (base / "README.md").read_text()
    assert card.startswith(f"# {DEFAULT_MODEL}\n")
    for words in ("## Data", "| study |", "licence", "GPL-3", "pbmc_frozenA_mudan", "## Not good for", "## Licence", "scGPT"):
        assert words in card, words


def test_the_shipped_folder_names_no_place_of_a_machine(base: Path) -> None:
    for name in ("README.md", "config.json"):
        text = (base / name).read_text()
        assert not [place for place in ("/work/", "/tmp/", "/home/", "/root/") if place in text]
