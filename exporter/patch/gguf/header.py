"""Rewrites the header of an existing GGUF file; the bytes of unchanged keys are copied from the old header."""

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
    """Return a copy of the header keys ``keys``, in which each key of ``changes`` replaces an old key or is added.

    An added key is inserted directly after all existing keys that precede the added key in ``order``.
    """
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
    """Return a copy of ``keys`` with ttexport's provenance keys, in the order of ttexport's GGUF writer.

    The provenance keys are inserted at the position of the file's first ``ttexport.`` key, or at the end of the header
    if the file has no ``ttexport.`` key.
    """
    recorded = [number for number, key in enumerate(keys) if key.name.startswith(PREFIX)]
    place = recorded[0] if recorded else len(keys)
    new = [writer.text(f"{PREFIX}{name}", value) for name, value in sorted(provenance.items())]
    others = [key for key in keys[place:] if not key.name.startswith(PREFIX)]
    return [*keys[:place], *new, *others]


def with_value(key: Key, value: int) -> Key:
    """Return a copy of the integer key ``key`` with the new value ``value`` and with the old integer type."""
    (type_number,) = struct.unpack_from("<I", key.encoded)
    return Key(key.name, struct.pack("<I", type_number) + np.asarray(value, SCALARS[type_number]).tobytes())


def number_array(name: str, item_type: int, values: Sequence[float]) -> Key:
    """Return a header key whose value is an array of numbers.

    item_type: GGUF's number for the type of the array items.
    """
    head = struct.pack("<IIQ", ARRAY, item_type, len(values))
    return Key(name, head + np.asarray(values, SCALARS[item_type]).tobytes())


def build(file: GgufFile, keys: Sequence[Key], n_rows: Mapping[str, int]) -> tuple[bytes, int]:
    """Return (header bytes, file size) of ``file`` after a patch that sets the header keys to ``keys``.

    n_rows: new numbers of rows by tensor name, for all tensors whose number of rows changes.
    """
    entries = [
        TensorEntry(tensor.name, tensor.type, (n_rows.get(tensor.name, tensor.shape[0]), *tensor.shape[1:]))
        for tensor in file.tensors.values()
    ]
    return writer.header(keys, entries, alignment=file.alignment, version=file.version)
