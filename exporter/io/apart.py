"""No output over an input."""

from __future__ import annotations

from collections.abc import Iterable
from os.path import abspath, realpath
from pathlib import Path

from exporter.errors import UsageError


def require_apart(out: Path, inputs: Iterable[Path], *, whole: Iterable[Path] = (), hint: str = "") -> None:
    """Raise UsageError if writing ``out`` would replace an input or a folder that contains it, even with --force.

    inputs: files and folders. whole: input folders that must not contain ``out`` either. hint: ends the message.
    Tolerates symlink loops; the reader of such a path reports them.
    """
    outs, folders = _names(out), set(whole)
    above = {parent for name in outs for parent in name.parents}
    for path in sorted(folders.union(inputs)):
        names = _names(path)
        replaced = any(outs & {name, *name.parents} for name in names)
        if replaced or (path in folders and above & names):
            tail = f" ({hint})" if hint else ""
            raise UsageError(f"-o {out}: expected a place apart from the inputs, found {path} there{tail}")


def _names(path: Path) -> set[Path]:
    """``path`` as given, with the links of its folder resolved, and with all links resolved.

    ``realpath``, unlike ``Path.resolve``, does not raise on a symlink loop.
    """
    return {Path(abspath(path)), Path(realpath(path.parent)) / path.name, Path(realpath(path))}
