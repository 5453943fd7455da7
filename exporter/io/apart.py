"""Refuses an output path that would overwrite an input."""

from __future__ import annotations

from collections.abc import Iterable
from os.path import abspath, realpath
from pathlib import Path

from exporter.errors import UsageError


def require_apart(out: Path, inputs: Iterable[Path], *, whole: Iterable[Path] = (), hint: str = "") -> None:
    """Raise UsageError if writing ``out`` would replace an input or a folder that contains an input, even with --force.

    inputs: input files and folders. whole: input folders that must not contain ``out`` either. hint: text in
    parentheses at the end of the message. Paths with symlink loops are accepted here; the reader of the path reports a
    loop.
    """
    outs, folders = _names(out), set(whole)
    above = {parent for name in outs for parent in name.parents}
    for path in sorted(folders.union(inputs)):
        names = _names(path)
        replaced = any(outs & {name, *name.parents} for name in names)
        if replaced or (path in folders and above & names):
            tail = f" ({hint})" if hint else ""
            raise UsageError(
                f"-o {out}: expected an output path that overwrites no input, found the input {path} there{tail}"
            )


def _names(path: Path) -> set[Path]:
    """Three spellings of ``path``: as given, with the links of its folder resolved, and with all links resolved.

    ``realpath``, unlike ``Path.resolve``, does not raise on a symlink loop.
    """
    return {Path(abspath(path)), Path(realpath(path.parent)) / path.name, Path(realpath(path))}
