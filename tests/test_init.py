from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import annformer as af

NAMES = {
    "AnnDataSource",
    "AnnformerWarning",
    "GeneVocab",
    "InputError",
    "ModelConfig",
    "ReferenceMapper",
    "ScGPT",
    "TokenizerSettings",
    "embed",
    "embed_file",
    "inspect",
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_loads_and_stays(name):
    value = getattr(af, name)
    assert value.__name__ == name
    assert getattr(af, name) is value


def test_dir_lists_the_public_names():
    assert NAMES | {"__version__"} <= set(dir(af))


def test_version_is_that_of_the_distribution():
    assert af.__version__ == version("annformer")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'embedd'"):
        _ = af.embedd


def test_import_loads_nothing_heavy():
    code = "import sys, annformer; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "pandas", "anndata", "numba", "scipy", "pydantic", "rich", "lightning", "scanpy"):
        assert f"'{heavy}'" not in loaded
