"""Rewrites the header of an existing GGUF file. Unchanged keys are written byte for byte as before."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from exporter.formats.gguf import writer
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.types import ARRAY, SCALARS
from exporter.sources.hub.locate import PREFIX


def changed_keys(keys: Sequence[Key], changes: Iterable[Key], order: Sequence[str]) -> list[Key]:
    """``keys`` with the values of ``changes``. A new key is placed after the nearest preceding key in ``order``."""
    result = list(keys)
    places = {key.name: number for number, key in enumerate(result)}
    for change in changes:
        if change.name in places:
            result[places[change.name]] = change
            continue
        before = order[: order.index(change.name)] if change.name in order else []
        place = max((places[name] + 1 for name in before if name in places), default=len(result))
        result.insert(place, change)
        places = {key.name: number for number, key in enumerate(result)}
    return result


def with_provenance(keys: Sequence[Key], provenance: Mapping[str, str]) -> list[Key]:
    """``keys`` with the provenance keys of ttexport, sorted as ttexport's writer sorts keys.

    The provenance keys are placed at the first key of ttexport in the file, or at the end if the file has no key of
    ttexport.
    """
    recorded = [number for number, key in enumerate(keys) if key.name.startswith(PREFIX)]
    place = recorded[0] if recorded else len(keys)
    new = [writer.text(f"{PREFIX}{name}", value) for name, value in sorted(provenance.items())]
    others = [key for key in keys[place:] if not key.name.startswith(PREFIX)]
    return [*keys[:place], *new, *others]


def with_value(key: Key, value: int) -> Key:
    """The integer key ``key`` with a new value, stored in the same type."""
    (type_number,) = struct.unpack_from("<I", key.encoded)
    return Key(key.name, struct.pack("<I", type_number) + np.asarray(value, SCALARS[type_number]).tobytes())


def number_array(name: str, item_type: int, values: Sequence[float]) -> Key:
    """A key with an array of numbers. item_type: type number of the items."""
    head = struct.pack("<IIQ", ARRAY, item_type, len(values))
    return Key(name, head + np.asarray(values, SCALARS[item_type]).tobytes())


def build(file: GgufFile, keys: Sequence[Key], n_rows: Mapping[str, int]) -> tuple[bytes, int]:
    """(header, size of the file) of a file with ``keys``.

    n_rows: tensor → number of rows, for tensors whose number of rows changes.
    """
    entries = [
        TensorEntry(tensor.name, tensor.type, (n_rows.get(tensor.name, tensor.shape[0]), *tensor.shape[1:]))
        for tensor in file.tensors.values()
    ]
    return writer.header(keys, entries, alignment=file.alignment, version=file.version)
