"""Read the metadata keys of an existing GGUF as raw bytes, so that a copy of the GGUF has identical keys."""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from exporter.formats.gguf.writer import Key
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.types import ARRAY, SCALARS, STRING
from exporter.sources.hf.safetensors import read_into

_PREAMBLE_BYTES: Final = 24  # size of magic, version, number of tensors, number of keys


def raw_header(file: GgufFile) -> bytes:
    """Return all bytes of the GGUF before the data section."""
    raw = np.empty(file.data_offset, np.uint8)
    read_into(file.path, 0, raw)
    return raw.tobytes()


def raw_keys(file: GgufFile) -> list[Key]:
    """Return all metadata keys in the order of the GGUF, with the values as raw bytes."""
    raw, at, keys = raw_header(file), _PREAMBLE_BYTES, []
    for name, value in file.metadata.items():
        at += 8 + len(name.encode())
        (value_type,) = struct.unpack_from("<I", raw, at)
        if value_type == ARRAY:
            assert isinstance(value, GgufArray)
            end = value.offset_bytes + value.nbytes
        elif value_type == STRING:
            end = at + 12 + struct.unpack_from("<Q", raw, at + 4)[0]
        else:
            end = at + 4 + SCALARS[value_type].itemsize
        keys.append(Key(name, raw[at:end]))
        at = end
    return keys
