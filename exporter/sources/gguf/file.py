"""Reads GGUF files: checks the header, and gives access to every tensor as a byte range of the file.

According to llama.cpp's docs/gguf.md, a little-endian GGUF file of version 3 begins with four fields: the magic, the
version, the number of tensors and the number of metadata keys. After these four fields, the file contains the metadata
keys with their typed values. After the metadata, the header lists a name, the dimensions (fastest-varying dimension
first), a type and an offset for every tensor. After the header and its padding comes the data section, in which every
tensor starts at a multiple of ``general.alignment``. The gguf package is not used to read a GGUF file, because the
package parses a large vocabulary string by string, which is slow.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import NotExpressible, TensorMismatch, UnreadableFile
from exporter.io.files import opened
from exporter.sources.gguf.header import MAX_HEADER_BYTES, GgufTensor, Scanner
from exporter.sources.gguf.types import dequantize_q8_0
from exporter.sources.hf.safetensors import read_into
from exporter.tensors import DTYPES, Array, cast


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file.

    metadata: the metadata keys with their values, in file order. tensors: the tensors, in the order of their data in
    the file. data_offset: offset of the data section from the start of the file, in bytes.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    data_offset: int

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the header of a GGUF file, without reading any tensor data.

        Raises UnreadableFile, naming the key or tensor, in the following cases: a wrong magic, version or byte order; a
        count or length that exceeds the file size; an unknown type; a duplicate name; an alignment that is not a power
        of two; tensors that overlap, that leave gaps between them, or that extend past the end of the file.
        """
        with _scanner(path) as scanner:
            header = scanner.scan()
        return cls(path, header.version, header.metadata, header.tensors, header.alignment, header.data_offset)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Return the stored bytes of the rows [start, stop) of a tensor as uint8 (stop - start, row_nbytes)."""
        tensor = self._tensor(name, start, stop)
        out = np.empty((stop - start, tensor.row_nbytes), np.uint8)
        read_into(self.path, tensor.offset_bytes + start * tensor.row_nbytes, out)
        return out

    def dequantize_rows(self, name: str, start: int, stop: int) -> Array:
        """Dequantise the rows [start, stop) of a tensor to float32 with shape (stop - start, length of the last axis).

        Raises NotExpressible if the gguf package cannot dequantise the type of the tensor.
        """
        tensor, raw = self._tensor(name, start, stop), self.rows(name, start, stop)
        if tensor.type in ("F32", "F16", "BF16", "F64"):
            return cast(raw.view(DTYPES[tensor.type]), "F32")
        if tensor.type == "Q8_0":
            return dequantize_q8_0(raw)
        # Imported here, because importing the package takes longer than opening the file, and common types do not need
        # the package.
        from gguf import GGMLQuantizationType, quants

        try:
            return np.asarray(quants.dequantize(raw, GGMLQuantizationType[tensor.type]), np.float32)
        except (KeyError, NotImplementedError) as exc:  # the package does not know the type, or cannot decode it
            raise NotExpressible(
                f"{self.path}: {name}", f"the gguf package cannot dequantise type {tensor.type}"
            ) from exc

    def _tensor(self, name: str, start: int, stop: int) -> GgufTensor:
        if name not in self.tensors:
            raise TensorMismatch(self.path, name, expected=f"a tensor named {name}", found="no such tensor")
        tensor = self.tensors[name]
        if not 0 <= start <= stop <= tensor.n_rows:
            expected = f"a row range within [0, {tensor.n_rows})"
            raise TensorMismatch(self.path, name, expected=expected, found=f"[{start}, {stop})")
        return tensor


def is_adapter(path: Path) -> bool:
    """Whether a GGUF file contains an adapter rather than a model."""
    return general_type(path) == "adapter"


def general_type(path: Path) -> object:
    """Return what a GGUF file contains: "model", "adapter", "mmproj" for encoders, or None if the file does not say.

    The function reads the header only up to the metadata key ``general.type``.
    """
    with _scanner(path) as scanner:
        return scanner.value_of("general.type")


@contextmanager
def _scanner(path: Path) -> Iterator[Scanner]:
    with opened(path) as (file, size):
        if size < 24:
            raise UnreadableFile(path, f"expected a GGUF header of at least 24 bytes, found a file of {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield Scanner(path, view, min(size, MAX_HEADER_BYTES), size)
