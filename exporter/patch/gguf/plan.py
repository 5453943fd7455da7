"""Plans the patch of a GGUF file: encodes the new rows, builds a new header if tokens are added, and computes sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from exporter.formats.gguf import writer
from exporter.formats.gguf.quantisation.tensors import encode_rows
from exporter.formats.gguf.raw_keys import raw_keys
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.patch.gguf import header, tokens
from exporter.patch.gguf.vocab_tensors import EMBEDDING, vocab_tensors
from exporter.patch.rows import RowEdits, collect_rows
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufTensor
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import Array

_SIZE_LABEL: Final = "general.size_label"
_ADD_BOS: Final = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class TensorPatch:
    """New rows for one vocabulary tensor.

    token_ids: ids of the new rows in ascending order. encoded: the encoded new rows as a uint8 array (number of new
    rows, bytes per row). n_rows: number of rows of the tensor after patching.
    """

    tensor: GgufTensor
    token_ids: tuple[int, ...]
    encoded: Array
    n_rows: int

    @property
    def grows(self) -> bool:
        """Whether the patch appends rows to the tensor."""
        return self.n_rows != self.tensor.n_rows


@dataclass(frozen=True)
class FilePatch:
    """The changes that a patch makes to one GGUF file.

    header: all new bytes before the data section, or None if the header does not change. nbytes: size of the patched
    file in bytes.
    """

    file: GgufFile
    header: bytes | None
    tensors: Sequence[TensorPatch]
    nbytes: int

    @property
    def in_place(self) -> bool:
        """Whether the patch changes neither the size of the header nor the size of a tensor."""
        fits = self.header is None or len(self.header) == self.file.data_offset
        return fits and not any(tensor.grows for tensor in self.tensors)


@dataclass(frozen=True)
class GgufPatch:
    """The planned patch of a GGUF model, which consists of the changes to each of its files.

    dtype: dtype to which new rows are rounded before encoding. new_tokens: the tokens that the patch adds to the model,
    as a dict from token id to text.
    """

    model: GgufModel
    files: Sequence[FilePatch]
    dtype: str
    vocab: int
    new_tokens: Mapping[int, str]

    @property
    def nbytes(self) -> int:
        """Total size of all files of the patched model in bytes."""
        return sum(file.nbytes for file in self.files)

    @property
    def in_place(self) -> bool:
        """Whether all files of the model can be patched in place."""
        return all(file.in_place for file in self.files)

    @property
    def storage(self) -> str:
        """GGUF tensor type of the embedding matrix."""
        return self.model.tensors[EMBEDDING].type


def plan_rows(model: GgufModel, adapters: Sequence[Adapter], dtype: str, provenance: Mapping[str, str]) -> GgufPatch:
    """Plan the patch of a GGUF model, and encode the new rows.

    The function reads the header of the model and no tensor data, except for rows that are compared to detect a stored
    copy of the embedding. dtype: dtype to which new rows are rounded before encoding, so that a patch and a merge give
    equal rows. provenance: provenance to record in the patched model. Raises UnreadableFile, NotExpressible, BadInput
    or TensorMismatch if the adapters' rows or tokenizers do not fit the model.
    """
    edits = collect_rows(vocab_tensors(model), adapters)
    keys = raw_keys(model.files[0])
    vocabulary = tokens.patch_vocabulary(model, {key.name: key for key in keys}, adapters, edits)
    patches = {name: _tensor_patch(model.tensors[name], edits, dtype, vocabulary.size) for name in edits.rows}
    changes = list(vocabulary.changes)
    kept: Sequence[Key] = [key for key in keys if key.name not in vocabulary.removed]
    if vocabulary.size != model.tensors[EMBEDDING].n_rows:
        more, kept = _of_size(model, kept, patches, states_bos=vocabulary.states_bos)
        changes += more
    patched = header.with_provenance(header.changed_keys(kept, changes, vocabulary.order), provenance)
    files = []
    for number, file in enumerate(model.files):
        own = [patches[name] for name in file.tensors if name in patches]
        n_rows = {patch.tensor.name: patch.n_rows for patch in own if patch.grows}
        if n_rows or (number == 0 and patched != keys):
            head, nbytes = header.build(file, patched if number == 0 else raw_keys(file), n_rows)
            files.append(FilePatch(file, head, own, nbytes))
        else:
            files.append(FilePatch(file, None, own, file.path.stat().st_size))
    return GgufPatch(model, files, dtype, vocabulary.size, vocabulary.new_tokens)


def _tensor_patch(tensor: GgufTensor, edits: RowEdits, dtype: str, size: int) -> TensorPatch:
    token_ids, encoded = edits.encode(tensor.name, dtype, lambda rows: encode_rows(rows, tensor.type))
    assert encoded.shape == (len(token_ids), tensor.row_nbytes), (encoded.shape, tensor)
    return TensorPatch(tensor, token_ids, np.ascontiguousarray(encoded), max(size, tensor.n_rows))


def _of_size(
    model: GgufModel, keys: Sequence[Key], patches: Mapping[str, TensorPatch], *, states_bos: bool
) -> tuple[list[Key], Sequence[Key]]:
    """Return (header keys to change, old header keys to keep) if the vocabulary size changes.

    The key ``general.size_label`` changes with the number of parameters. llama.cpp's converter writes the key
    add_bos_token with the value false if the vocabulary has exactly ``NO_BOS_VOCAB`` tokens. That key is therefore
    removed if the vocabulary grows, unless the adapter's tokenizer sets add_bos_token.
    """
    # Imported here, because the modules import the families, and most patches keep the size of the vocabulary.
    from exporter.formats.gguf.metadata import size_class
    from exporter.formats.gguf.plan import NO_BOS_VOCAB

    old = [TensorEntry(tensor.name, tensor.type, tensor.shape) for tensor in model.tensors.values()]
    new = [
        replace(entry, shape=(patches[entry.name].n_rows, *entry.shape[1:])) if entry.name in patches else entry
        for entry in old
    ]
    before, after = (writer.text(_SIZE_LABEL, size_class(entries)) for entries in (old, new))
    if model.tensors[EMBEDDING].n_rows == NO_BOS_VOCAB and not states_bos:
        keys = [key for key in keys if key != writer.truth(_ADD_BOS, False)]
    return [after] if before in keys else [], keys
