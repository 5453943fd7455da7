"""From a GGUF and row adapters to what changes in it: rows by place, a new header where tokens are new, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from exporter.errors import in_tensor
from exporter.formats.gguf import writer
from exporter.formats.gguf.quantisation.tensors import encode_rows
from exporter.formats.gguf.raw_keys import raw_keys
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.patch.gguf import header, rows, tokens
from exporter.patch.rows import Wanted, gather, rounded
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufTensor
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import Array

_SIZE_LABEL: Final = "general.size_label"
_ADD_BOS: Final = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class TensorPatch:
    """New rows of one tensor: ``token_ids`` ascending, ``encoded`` (k, bytes a row) uint8. n_rows: after patching."""

    tensor: GgufTensor
    token_ids: tuple[int, ...]
    encoded: Array
    n_rows: int

    @property
    def grows(self) -> bool:
        """Whether rows are added."""
        return self.n_rows != self.tensor.n_rows


@dataclass(frozen=True)
class FilePatch:
    """What changes in one file. header: all bytes before its data section, None if they stay. nbytes: of the result."""

    file: GgufFile
    header: bytes | None
    tensors: Sequence[TensorPatch]
    nbytes: int

    @property
    def in_place(self) -> bool:
        """Whether every byte that stays keeps its offset."""
        fits = self.header is None or len(self.header) == self.file.data_offset
        return fits and not any(one.grows for one in self.tensors)


@dataclass(frozen=True)
class GgufPatch:
    """The whole patch. new: texts of tokens that are new to the file by id. dtype: what rows were rounded to first."""

    parts: GgufModel
    files: Sequence[FilePatch]
    dtype: str
    vocab: int
    new: Mapping[int, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(one.nbytes for one in self.files)

    @property
    def in_place(self) -> bool:
        """Whether the files can be patched where they lie."""
        return all(one.in_place for one in self.files)

    @property
    def kind(self) -> str:
        """The type of the embedding."""
        return self.parts.tensors[rows.EMBEDDING].type


def plan_rows(parts: GgufModel, adapters: Sequence[Adapter], dtype: str, provenance: Mapping[str, str]) -> GgufPatch:
    """Decide what changes and encode the new rows; no tensor of the file is read but for a few rows.

    dtype: rows are rounded to it before they are encoded, as a merge rounds them to the base's dtype.
    provenance: what the patched file is to say of its making.
    Raises what ``rows.matrices``, ``gather``, ``rounded``, ``tokens.patch_vocabulary`` and ``encode_rows`` raise.
    """
    wanted = gather(rows.matrices(parts), adapters)
    keys = raw_keys(parts.files[0])
    vocabulary = tokens.patch_vocabulary(parts, {key.name: key for key in keys}, adapters, wanted)
    patches = {name: _tensor_patch(parts, name, wanted, dtype, vocabulary.size) for name in wanted.rows}
    changes = list(vocabulary.changes)
    kept: Sequence[Key] = keys
    if vocabulary.size != parts.tensors[rows.EMBEDDING].n_rows:
        more, kept = _of_size(parts, keys, patches, states_bos=vocabulary.states_bos)
        changes += more
    merged = header.with_provenance(header.changed_keys(kept, changes, tokens.ORDER), provenance)
    files = []
    for number, file in enumerate(parts.files):
        own = [patches[name] for name in file.tensors if name in patches]
        lengths = {one.tensor.name: one.n_rows for one in own if one.grows}
        if lengths or (number == 0 and merged != keys):
            head, nbytes = header.build(file, merged if number == 0 else raw_keys(file), lengths)
            files.append(FilePatch(file, head, own, nbytes))
        else:
            files.append(FilePatch(file, None, own, file.path.stat().st_size))
    return GgufPatch(parts, files, dtype, vocabulary.size, vocabulary.new)


def _tensor_patch(parts: GgufModel, name: str, wanted: Wanted, dtype: str, size: int) -> TensorPatch:
    tensor, part = parts.tensors[name], wanted.where[name]
    ids, values = rounded(wanted, name, dtype)
    with in_tensor(part.path, part.key):
        encoded = encode_rows(values, tensor.type)
    assert encoded.shape == (len(ids), tensor.row_nbytes), (encoded.shape, tensor)
    return TensorPatch(tensor, ids, np.ascontiguousarray(encoded), max(size, tensor.n_rows))


def _of_size(
    parts: GgufModel, keys: Sequence[Key], patches: Mapping[str, TensorPatch], *, states_bos: bool
) -> tuple[list[Key], Sequence[Key]]:
    """(keys that change with the number of tokens, the keys without one that stood for the old number alone)."""
    # Here, because they bring the families, and most patches keep the vocabulary as large as it is.
    from exporter.formats.gguf.metadata import size_class
    from exporter.formats.gguf.plan import NO_BOS_VOCAB

    old = [TensorEntry(one.name, one.type, one.shape) for one in parts.tensors.values()]
    new = [
        replace(entry, shape=(patches[entry.name].n_rows, *entry.shape[1:])) if entry.name in patches else entry
        for entry in old
    ]
    before, after = (writer.text(_SIZE_LABEL, size_class(entries)) for entries in (old, new))
    if parts.tensors[rows.EMBEDDING].n_rows == NO_BOS_VOCAB and not states_bos:
        keys = [key for key in keys if key != writer.truth(_ADD_BOS, False)]
    return [after] if before in keys else [], keys
