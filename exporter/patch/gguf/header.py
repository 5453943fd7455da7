"""The header of an existing GGUF as keys that can be written again, byte for byte, some of them with other values."""

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
    """``keys`` with the values of ``changes``. A key that the file lacks goes behind its nearest one in ``order``."""
    out = list(keys)
    places = {key.name: number for number, key in enumerate(out)}
    for change in changes:
        if change.name in places:
            out[places[change.name]] = change
            continue
        before = order[: order.index(change.name)] if change.name in order else []
        place = max((places[name] + 1 for name in before if name in places), default=len(out))
        out.insert(place, change)
        places = {key.name: number for number, key in enumerate(out)}
    return out


def with_provenance(keys: Sequence[Key], provenance: Mapping[str, str]) -> list[Key]:
    """``keys`` with our own ones, sorted as our writer sorts them, where the first of them was, else at the end."""
    ours = [number for number, key in enumerate(keys) if key.name.startswith(PREFIX)]
    place = ours[0] if ours else len(keys)
    told = [writer.text(f"{PREFIX}{name}", value) for name, value in sorted(provenance.items())]
    others = [key for key in keys[place:] if not key.name.startswith(PREFIX)]
    return [*keys[:place], *told, *others]


def same_kind(old: Key, value: int) -> Key:
    """An integer key with another value, in the type that it has."""
    (kind,) = struct.unpack_from("<I", old.encoded)
    return Key(old.name, struct.pack("<I", kind) + np.asarray(value, SCALARS[kind]).tobytes())


def numbers(name: str, kind: int, values: Sequence[float]) -> Key:
    """An array of numbers of the type number ``kind``."""
    return Key(name, struct.pack("<IIQ", ARRAY, kind, len(values)) + np.asarray(values, SCALARS[kind]).tobytes())


def build(file: GgufFile, keys: Sequence[Key], rows: Mapping[str, int]) -> tuple[bytes, int]:
    """(header, size of the file) with ``keys``, and ``rows`` rows for the tensors named."""
    entries = [
        TensorEntry(one.name, one.type, (rows.get(one.name, one.shape[0]), *one.shape[1:]))
        for one in file.tensors.values()
    ]
    return writer.header(keys, entries, alignment=file.alignment, version=file.version)
