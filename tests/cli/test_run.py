from __future__ import annotations

import errno
import logging
import signal
import sys
import time
import types
import warnings

import pytest

from annformer.cli._messages import explain
from annformer.cli._run import run
from annformer.errors import AnnformerWarning, input_error


@pytest.fixture
def command(monkeypatch):
    """Put a function in the place of a command's module."""

    def put(action):
        def work(*, out: str = "here") -> int | None:
            """Work."""
            return action()

        module = types.ModuleType("annformer.cli.work")
        module.command = work
        monkeypatch.setitem(sys.modules, "annformer.cli.work", module)

    return put


def failing(error: BaseException):
    def action():
        raise error

    return action


@pytest.fixture
def heard():
    """Ctrl-C, which a shell that runs the tests in the background has taken away from all its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_while_an_object_is_taken_apart_is_not_lost(command, capsys):
    class Slow:
        def __del__(self):
            raise KeyboardInterrupt

    def action():
        Slow()
        time.sleep(30)

    command(action)
    began = time.monotonic()
    assert run("work", []) == 2
    assert time.monotonic() - began < 15
    assert "Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (input_error("this is wrong", "that", "do so"), 2, "what to do: do so"),
        (KeyboardInterrupt(), 2, "Ctrl-C"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.h5ad"), 2, "a.h5ad"),
        (PermissionError(errno.EACCES, "Permission denied", "b.h5ad"), 2, "no permission for b.h5ad"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (RuntimeError("Can't write (file write failed: errno = 27, error message = 'File too large')"), 2, "disk is full"),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), 2, "annformer[report]"),
        (ModuleNotFoundError("No module named 'torhc'", name="torhc"), 1, "mistake in annformer"),
        (RuntimeError("shapes differ"), 1, "RuntimeError: shapes differ"),
    ],
)
def test_an_error_is_one_message_and_a_status(command, capsys, error, status, said):
    command(failing(error))
    assert run("work", []) == status
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_the_cause_counts():
    error = ValueError("outer")
    error.__cause__ = OSError(errno.ENOSPC, "No space left")
    assert "disk is full" in explain(error)


def test_debug_shows_the_traceback(command, capsys):
    command(failing(input_error("this is wrong", "that", "do so")))
    assert run("work", ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_log_and_warnings_are_plain_lines_and_leave_no_trace(command, capsys):
    log = logging.getLogger("annformer.somewhere")

    def action():
        log.info("reading")
        warnings.warn("odd", AnnformerWarning, stacklevel=1)
        warnings.warn("internal of a dependency", FutureWarning, stacklevel=1)

    command(action)
    before = list(logging.getLogger("annformer").handlers)
    assert run("work", []) == 0
    assert capsys.readouterr().err == "INFO reading\nWARNING odd\n"
    assert run("work", ["--quiet"]) == 0
    assert capsys.readouterr().err == "WARNING odd\n"
    assert logging.getLogger("annformer").handlers == before


def test_status_of_the_command_is_passed_on(command):
    command(lambda: 3)
    assert run("work", []) == 3
