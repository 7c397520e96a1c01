from __future__ import annotations

import subprocess
import sys

import pytest

from annformer.cli import COMMANDS, SUBCOMMANDS, main

TYPED = [name for name in COMMANDS if name not in ("version", *SUBCOMMANDS)]
TYPED += [f"{name} {inner}" for name, verbs in SUBCOMMANDS.items() for inner in verbs]


def test_help_names_every_command_and_needs_nothing_heavy():
    code = (
        "import sys; from annformer.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'numpy', 'pydantic', 'jsonargparse', 'rich', 'anndata'} & set(sys.modules);"
        "print(status, sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "0 []"
    for name in COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("words", [[], ["-h"], ["help"]])
def test_no_command_is_help(words, capsys):
    assert main(words) == 0
    assert "commands:" in capsys.readouterr().out


def test_unknown_command_names_the_near_one(capsys):
    assert main(["convret"]) == 2
    captured = capsys.readouterr()
    assert "did you mean convert?" in captured.err
    assert captured.out == ""


def test_version_names_what_a_report_needs(capsys):
    assert main(["version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("annformer ")
    assert "torch 2." in out


@pytest.mark.parametrize("name", TYPED)
def test_every_command_has_help_for_every_option(name, capsys):
    import inspect
    from importlib import import_module

    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    module, _, inner = name.partition(" ")
    command = getattr(import_module(f"annformer.cli.{module}"), inner or "command")
    documented = inspect.getdoc(command)
    for parameter in inspect.signature(command).parameters.values():
        assert f"--{parameter.name}" in out or f"\n  {parameter.name.upper()} " in out
        assert f"\n{parameter.name}\n" in documented, f"{parameter.name} is not explained"


@pytest.mark.parametrize("name", sorted({*COMMANDS, *TYPED}))
def test_command_help_does_not_import_torch(name):
    code = f"import sys; from annformer.cli import main; main([*{name.split()!r}, '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
