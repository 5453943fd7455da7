"""New tokens' and trained tokens' bytes of one initialiser: as pieces to overwrite, or as the whole when it grows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.sources.onnx.tensors import TensorRange
from exporter.tensors import Array, ByteRange


@dataclass(frozen=True)
class PartPatch:
    """``data`` (k, bytes a token) uint8 for the tokens ``token_ids``, ascending. axis: of the tensor, counts tokens.

    n_tokens: before; size: after.
    """

    tensor: TensorRange
    axis: int
    token_ids: tuple[int, ...]
    data: Array
    n_tokens: int
    size: int

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return self.tensor.nbytes // self.n_tokens

    @property
    def nbytes(self) -> int:
        """Bytes after patching."""
        return self.width * self.size

    @property
    def grows(self) -> bool:
        """Whether tokens are added."""
        return self.size != self.n_tokens

    @property
    def shape(self) -> tuple[int, ...]:
        """After patching; the axis of tokens may hold several entries a token, as flat scales do."""
        return tuple(
            length // self.n_tokens * self.size if axis == self.axis else length
            for axis, length in enumerate(self.tensor.shape)
        )

    def pieces(self, offset_bytes: int) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the tokens that were there before, in a patched tensor that begins at ``offset_bytes``."""
        known = [
            (token_id, row) for token_id, row in zip(self.token_ids, self.data, strict=True) if self._is_old(token_id)
        ]
        if self.axis == 0:
            yield from ((offset_bytes + token_id * self.width, row.tobytes()) for token_id, row in known)
            return
        item = self._item_nbytes
        for line in range(self.tensor.shape[0]):
            start = offset_bytes + line * self.size * item
            for token_id, row in known:
                yield start + token_id * item, row[line * item : (line + 1) * item].tobytes()

    def segments(self) -> Iterator[ByteRange | Array]:
        """All bytes of the grown tensor, but for the tokens that ``pieces`` overwrites."""
        place = self.tensor.place
        assert place is not None, "a tensor inside the model file is patched by patched_bytes"
        new = self._new
        if self.axis == 0:
            yield place
            yield new
            return
        item = self._item_nbytes
        length = self.n_tokens * item
        for line in range(self.tensor.shape[0]):
            yield ByteRange(place.path, place.offset_bytes + line * length, length)
            yield np.ascontiguousarray(new[:, line * item : (line + 1) * item])

    def patched_bytes(self, raw: bytes) -> bytes:
        """The whole tensor from its old bytes. Memory: twice the tensor."""
        old = np.frombuffer(raw, np.uint8)
        if self.axis == 0:
            out = np.concatenate([old.reshape(self.n_tokens, self.width), self._new])
            out[list(self.token_ids)] = self.data
            return out.tobytes()
        item = self._item_nbytes
        lines = old.reshape(self.tensor.shape[0], self.n_tokens, item)
        added = np.zeros((len(lines), self.size - self.n_tokens, item), np.uint8)
        out = np.concatenate([lines, added], axis=1)
        out[:, list(self.token_ids)] = self.data.reshape(len(self.data), len(lines), item).transpose(1, 0, 2)
        return out.tobytes()

    @property
    def _new(self) -> Array:
        rows: Array = self.data[[not self._is_old(token_id) for token_id in self.token_ids]]
        return np.ascontiguousarray(rows)

    def _is_old(self, token_id: int) -> bool:
        return token_id < self.n_tokens

    @property
    def _item_nbytes(self) -> int:
        return self.tensor.nbytes // math.prod(self.tensor.shape)
