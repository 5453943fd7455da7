"""The header of an existing GGUF as keys: written again byte for byte, some of them with other values."""

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
    """``keys`` with the values of ``changes``. A key that the file lacks goes behind the nearest key in ``order``."""
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
    """``keys`` with the keys of ttexport, sorted as our writer sorts them.

    They take the place of the first such key in the file; without one, they go to the end.
    """
    recorded = [number for number, key in enumerate(keys) if key.name.startswith(PREFIX)]
    place = recorded[0] if recorded else len(keys)
    new = [writer.text(f"{PREFIX}{name}", value) for name, value in sorted(provenance.items())]
    others = [key for key in keys[place:] if not key.name.startswith(PREFIX)]
    return [*keys[:place], *new, *others]


def with_value(key: Key, value: int) -> Key:
    """An integer key with another value, stored in the same type."""
    (type_number,) = struct.unpack_from("<I", key.encoded)
    return Key(key.name, struct.pack("<I", type_number) + np.asarray(value, SCALARS[type_number]).tobytes())


def number_array(name: str, item_type: int, values: Sequence[float]) -> Key:
    """An array of numbers. item_type: their type number."""
    head = struct.pack("<IIQ", ARRAY, item_type, len(values))
    return Key(name, head + np.asarray(values, SCALARS[item_type]).tobytes())


def build(file: GgufFile, keys: Sequence[Key], n_rows: Mapping[str, int]) -> tuple[bytes, int]:
    """(header, size of the file) with ``keys``. n_rows: tensor → its rows, where they differ from the file."""
    entries = [
        TensorEntry(tensor.name, tensor.type, (n_rows.get(tensor.name, tensor.shape[0]), *tensor.shape[1:]))
        for tensor in file.tensors.values()
    ]
    return writer.header(keys, entries, alignment=file.alignment, version=file.version)
