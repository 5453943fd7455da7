"""Split a GGUF into parts, with the file names and part numbers that llama.cpp's converter and gguf-split use.

The first part of a split GGUF contains all metadata keys. The parts contain the tensors in their original order, copied
as raw bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.errors import UsageError
from exporter.formats.gguf import writer
from exporter.formats.gguf.raw_keys import raw_keys
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.io.output import OutputFile
from exporter.progress import Progress, silent
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufTensor
from exporter.sources.gguf.split_files import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_file_name
from exporter.tensors import ByteRange

_U16, _I32 = 2, 5


@dataclass(frozen=True, slots=True)
class Split:
    """Limits for the parts of a split GGUF: the maximum size of the tensor data in bytes, and the number of tensors.

    If a limit is None, the size or the number of tensors of a part is unlimited.
    """

    max_nbytes: int | None = None
    max_tensors: int | None = None

    def group(self, tensors: Sequence[GgufTensor]) -> list[list[GgufTensor]]:
        """Group ``tensors`` into parts without changing the order of the tensors.

        The data of a single tensor is never divided between parts.
        """
        groups: list[list[GgufTensor]] = [[]]
        nbytes = 0
        for tensor in tensors:
            full = self.max_tensors is not None and len(groups[-1]) >= self.max_tensors
            full |= self.max_nbytes is not None and nbytes + tensor.nbytes > self.max_nbytes
            if full and groups[-1]:
                groups.append([])
                nbytes = 0
            groups[-1].append(tensor)
            nbytes += tensor.nbytes
        return groups


def split_file(path: Path, split: Split, progress: Progress = silent) -> list[Path]:
    """Replace the GGUF ``path`` by parts in the same folder, if the GGUF exceeds the limits of ``split``.

    Returns the paths of the parts. Peak memory: the size of the GGUF's header. Raises OutputError if a part cannot be
    written, and UsageError if the number of parts does not fit in 16 bits.
    """
    file = GgufFile.open(path)
    groups = split.group(list(file.tensors.values()))
    count, total = len(groups), len(file.tensors)
    if count == 1:
        progress(path.stat().st_size)
        return [path]
    if count > 0xFFFF:
        raise UsageError(f"--split-max-size: expected at most {0xFFFF} parts, found {count}")
    parts = [path.with_name(split_file_name(path.stem, number, count)) for number in range(count)]
    for number, (part, tensors) in enumerate(zip(parts, groups, strict=True)):
        part_keys = [
            _number(SPLIT_NO, _U16, number),
            _number(SPLIT_COUNT, _U16, count),
            _number(SPLIT_TENSORS, _I32, total),
        ]
        keys = [*(raw_keys(file) if number == 0 else ()), *part_keys]
        entries = [TensorEntry(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
        head, nbytes = writer.header(keys, entries, alignment=file.alignment)
        with OutputFile(part, progress, nbytes=nbytes) as out:
            out.write(head)
            for tensor in tensors:
                out.write_segments([ByteRange(path, tensor.offset_bytes, tensor.nbytes)], tensor.nbytes)
                out.pad_to(file.alignment)
            assert out.nbytes == nbytes, f"{part}: expected {nbytes} bytes, wrote {out.nbytes}"
    path.unlink()
    return parts


def _number(name: str, value_type: int, value: int) -> Key:
    dtype = {_U16: "<u2", _I32: "<i4"}[value_type]
    return Key(name, struct.pack("<I", value_type) + np.asarray(value, dtype).tobytes())
