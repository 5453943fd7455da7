"""Refuses output paths that would overwrite an input."""

from __future__ import annotations

from collections.abc import Iterable
from os.path import abspath, realpath
from pathlib import Path

from exporter.errors import UsageError


def require_apart(out: Path, inputs: Iterable[Path], *, whole: Iterable[Path] = (), hint: str = "") -> None:
    """Raise UsageError if writing ``out`` would replace an input or a folder that contains an input.

    Even with --force, ttexport never overwrites an input. inputs: input files and folders. whole: input folders that
    must not contain ``out``. hint: text that is appended to the error message in parentheses. A path with a symlink
    loop raises no error here, because the code that later opens the path reports the loop.
    """
    outs, folders = _names(out), set(whole)
    above = {parent for name in outs for parent in name.parents}
    for path in sorted(folders.union(inputs)):
        names = _names(path)
        replaced = any(outs & {name, *name.parents} for name in names)
        if replaced or (path in folders and above & names):
            tail = f" ({hint})" if hint else ""
            raise UsageError(
                f"-o {out}: expected an output path that overwrites no input, "
                f"found a path that overwrites the input {path}{tail}"
            )


def _names(path: Path) -> set[Path]:
    """Return three versions of ``path``: absolute, with symlinks in the parent folder resolved, and fully resolved.

    The paths are resolved with ``os.path.realpath``, because ``Path.resolve`` raises an error for a symlink loop.
    """
    return {Path(abspath(path)), Path(realpath(path.parent)) / path.name, Path(realpath(path))}
