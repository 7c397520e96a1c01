"""What an exception means to the person at the keyboard."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from annformer.errors import InputError, input_error

EXTRAS = {
    "jinja2": "report",
    "matplotlib": "report",
    "plotly": "report",
    "scib_metrics": "evaluate",
    "igraph": "cluster",
    "leidenalg": "cluster",
    "harmonypy": "harmony",
    "scvi": "baselines",
    "faiss": "atlas",
}
"""Import name of an optional package -> the extra that installs it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: BaseException) -> str | None:
    """Message for what the user can put right; None when the error is ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, KeyboardInterrupt) and error.args:
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        remedy = "run it again: integrate, compare, pretrain and annotate --tuning go on, embed and prepare do with --resume"
        return str(input_error("stopped by Ctrl-C; no output was left half written", "to run to the end", remedy))
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = f"annformer[{EXTRAS[error.name]}]"
        return str(input_error(f"the package {error.name} is not installed", f"the extra {extra}", f"pip install '{extra}'"))
    for link in _chain(error):
        if isinstance(link, InputError):
            return str(link)
        code = _errno(link)
        if code is not None:
            return str(_system(code, link))
    return None


def our_fault(error: BaseException) -> str:
    """One line about an error that no input should cause, and how to tell us."""
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text[:300]}\n  This is a mistake in annformer, not in your input."
        "\n  what to do: run the same command with --debug and report its output together with that of `annformer version`."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _errno(error: BaseException) -> int | None:
    """Number of the operating system's error; HDF5 reports it inside its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    inside = re.search(r"errno = (\d+)", str(error)) if isinstance(error, OSError | RuntimeError) else None
    return int(inside[1]) if inside else None


def _system(code: int, error: BaseException) -> InputError:
    path = getattr(error, "filename", None)
    named = f" {path}" if path else ""
    if code in FULL:
        return input_error(
            f"the disk is full or a file may not grow further{named}", "room for the output", "free space or choose another --out"
        )
    if code == errno.ENOENT:
        return input_error(f"there is no file or folder{named}", "a path that exists", "check the spelling")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return input_error(
            f"no permission for{named or ' a file'}", "a place where you may read and write", "choose another path, e.g. --out"
        )
    if code in (errno.ENOTDIR, errno.EEXIST):
        return input_error(f"{named.strip() or 'a path'} is in the way", "a free path below a folder", "choose another path")
    if code == errno.EIO:
        text = f"reading{named} failed: {getattr(error, 'strerror', None) or error}"
        remedy = "run it again, with --resume where a line above says that the work done is kept"
        return input_error(text, "a disk or a connection that answers", remedy)
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return input_error(f"the system refused{named}: {text}", "files that can be read and written", "check the path and the disk")
