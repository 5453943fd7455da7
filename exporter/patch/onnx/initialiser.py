"""Computes the new bytes of an ONNX initialiser that stores a vocabulary matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.sources.onnx.tensors import TensorRange
from exporter.tensors import Array, ByteRange


@dataclass(frozen=True)
class InitialiserPatch:
    """New bytes for some tokens in one ONNX initialiser that stores a vocabulary matrix or a part of the matrix.

    token_ids: ids of the changed and added tokens in ascending order. data: the new bytes as a uint8 array
    (len(token_ids), bytes per token). token_axis: axis of the tensor that has one entry per token. n_tokens: number of
    tokens before patching. vocab: number of tokens after patching.
    """

    tensor: TensorRange
    token_axis: int
    token_ids: tuple[int, ...]
    data: Array
    n_tokens: int
    vocab: int

    @property
    def token_nbytes(self) -> int:
        """Number of bytes that the tensor stores per token."""
        return self.tensor.nbytes // self.n_tokens

    @property
    def nbytes(self) -> int:
        """Size of the patched tensor in bytes."""
        return self.token_nbytes * self.vocab

    @property
    def grows(self) -> bool:
        """Whether the patch appends entries for new tokens to the tensor."""
        return self.vocab != self.n_tokens

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after patching.

        In a flattened tensor, such as the scales of a quantised matrix, the token axis has several entries per token.
        """
        return tuple(
            length // self.n_tokens * self.vocab if axis == self.token_axis else length
            for axis, length in enumerate(self.tensor.shape)
        )

    def pieces(self, offset_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset in the file, new bytes) for every existing token that changes."""
        known = [
            (token_id, row) for token_id, row in zip(self.token_ids, self.data, strict=True) if self._is_old(token_id)
        ]
        if self.token_axis == 0:
            yield from ((offset_bytes + token_id * self.token_nbytes, row.tobytes()) for token_id, row in known)
            return
        item = self._item_nbytes
        for line in range(self.tensor.shape[0]):
            start = offset_bytes + line * self.vocab * item
            for token_id, row in known:
                yield start + token_id * item, row[line * item : (line + 1) * item].tobytes()

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield the content of a tensor that grows: the old bytes, with the bytes of added tokens appended."""
        place = self.tensor.place
        assert place is not None, "use patched_bytes for a tensor that is stored inside the model file"
        new = self._new
        if self.token_axis == 0:
            yield place
            yield new
            return
        item = self._item_nbytes
        length = self.n_tokens * item
        for line in range(self.tensor.shape[0]):
            yield ByteRange(place.path, place.offset_bytes + line * length, length)
            yield np.ascontiguousarray(new[:, line * item : (line + 1) * item])

    def patched_bytes(self, raw: bytes) -> bytes:
        """Return the bytes of the whole patched tensor.

        raw: the bytes of the tensor before patching. Memory: twice the tensor.
        """
        old = np.frombuffer(raw, np.uint8)
        if self.token_axis == 0:
            rows = np.concatenate([old.reshape(self.n_tokens, self.token_nbytes), self._new])
            rows[list(self.token_ids)] = self.data
            return rows.tobytes()
        item = self._item_nbytes
        lines = old.reshape(self.tensor.shape[0], self.n_tokens, item)
        added = np.zeros((len(lines), self.vocab - self.n_tokens, item), np.uint8)
        columns = np.concatenate([lines, added], axis=1)
        columns[:, list(self.token_ids)] = self.data.reshape(len(self.data), len(lines), item).transpose(1, 0, 2)
        return columns.tobytes()

    @property
    def _new(self) -> Array:
        rows: Array = self.data[[not self._is_old(token_id) for token_id in self.token_ids]]
        return np.ascontiguousarray(rows)

    def _is_old(self, token_id: int) -> bool:
        return token_id < self.n_tokens

    @property
    def _item_nbytes(self) -> int:
        return self.tensor.nbytes // math.prod(self.tensor.shape)
