"""Writes a patched copy of an ONNX folder from byte ranges of the old files, new bytes, and new small files."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.errors import writing
from exporter.io.output import OutputFile
from exporter.io.staging import write_file
from exporter.patch.journal import Changes, overwrite
from exporter.patch.onnx.data import DataPatch
from exporter.patch.onnx.plan import OnnxPatch
from exporter.progress import Progress, silent
from exporter.tensors import ByteRange


def write_patched(patch: OnnxPatch, out: Path, progress: Progress = silent) -> None:
    """Write the patched folder to the new path ``out``.

    Peak memory: the size of the new rows plus the size of the small files.

    If two unchanged files of the base are hard links to one file, the copies in ``out`` are also hard links to one
    file. Raises OutputError if a write fails, and UnreadableFile if a file of the base is truncated.
    """
    written: dict[tuple[int, int], Path] = {}
    for name in patch.names:
        source, target = patch.folder / name, out / name
        content, data = patch.contents.get(name), patch.data.get(source)
        if content is not None:
            write_file(target, content)
            continue
        status = source.stat()
        first = written.setdefault((status.st_dev, status.st_ino), target)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if first is not target:
                target.hardlink_to(first)
                continue
        _write(source, data, target, progress)


def changes_in_place(patch: OnnxPatch) -> Changes:
    """Return the changes that an in-place patch makes to the files. Requires that ``patch.moves_bytes`` is False.

    If several paths are hard links to one data file, the changes contain only one of the paths.
    """
    inodes = {(status.st_dev, status.st_ino): path for path in patch.data for status in [path.stat()]}
    pieces = {path: patch.data[path].pieces for path in inodes.values()}
    return Changes(pieces, {patch.folder / name: content for name, content in patch.contents.items()})


def _write(source: Path, data: DataPatch | None, target: Path, progress: Progress) -> None:
    nbytes = data.nbytes if data else source.stat().st_size
    with OutputFile(target, progress, nbytes=nbytes) as out:
        for segment in data.segments if data else [ByteRange(source, 0, nbytes)]:
            if isinstance(segment, ByteRange):
                out.copy(segment)
            else:
                out.write(segment)
    if data and data.pieces:
        with writing(target), target.open("r+b", buffering=0) as file:
            overwrite(file.fileno(), data.pieces)
            os.fsync(file.fileno())
