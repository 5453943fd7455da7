"""Reads and encodes token rows in the storage formats that ONNX exporters use for vocabulary matrices.

A vocabulary matrix is stored with one row per token, with one column per token, or as block-quantised codes with scales
and zero points. The tensors of codes, scales and zero points each have one row per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from exporter.formats.onnx.weights.blocks import Blocks
from exporter.patch.evidence import VocabRows, sample
from exporter.patch.onnx.refusal import refusal
from exporter.patch.onnx.scaled import Scaled
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.tensors import TensorRange
from exporter.tensors import DTYPES, FLOATS, Array, cast

#: Maximum distance, in norms, between two stored copies of a row. Rounding to 4 bits moves a row by about a tenth of
#: its norm; the distance to a row of an unrelated matrix is about 1.4 norms.
_SAME_WITHIN_NORMS: Final = 0.5


@dataclass(frozen=True)
class VocabMatrix:
    """The vocabulary matrix ``name`` of the ONNX model ``file``.

    blocks: the block quantisation of the matrix, or None if the matrix is not block-quantised. scaled: the quantisation
    with a single scale, or None if the matrix has no single scale. tensors: the initialisers that store the matrix: the
    values or codes, then any scales and zero points.
    """

    file: OnnxFile
    name: str
    blocks: Blocks | None
    scaled: Scaled | None
    tensors: Sequence[TensorRange]

    @classmethod
    def of(cls, file: OnnxFile, name: str) -> VocabMatrix:
        """Return the vocabulary matrix ``name`` of the ONNX model ``file``.

        Raises NotExpressible if ttexport cannot encode rows in the storage format of the matrix.
        """
        matrix = cls(file, name, _blocks_of(file, name), Scaled.of(file, name), file.stored_tensors(name))
        matrix._check()
        return matrix

    @property
    def n_tokens(self) -> int:
        """Number of tokens for which the matrix has rows."""
        return self.file.tokens(self.name)

    @property
    def token_axis(self) -> int:
        """The axis that has one entry per token, in every tensor of ``tensors``."""
        return self.file.token_axis[self.name]

    @property
    def hidden(self) -> int:
        """The hidden size, which is the number of values that the matrix contains per token."""
        main = self.tensors[0]
        if self.blocks:
            return main.nbytes * 8 // self.blocks.bits // self.n_tokens
        return math.prod(main.shape) // self.n_tokens

    @property
    def storage(self) -> str:
        """Description of the storage format, such as ``BF16`` or ``int4 x 32, scales F16``."""
        if self.scaled:
            return f"{self.scaled.dtype} with one scale"
        if self.blocks is None:
            return self.tensors[0].dtype
        zeros = "" if self.blocks.symmetric else " with zero points"
        return f"int{self.blocks.bits} x {self.blocks.size}{zeros}, scales {self.tensors[1].dtype}"

    @property
    def rows(self) -> VocabRows:
        """Return an object that reads single rows of the matrix, to compare the rows with a checkpoint."""

        def encode(row: Array) -> Array:
            return np.concatenate(self.encode(row), axis=1)

        shape = (self.n_tokens, self.hidden)
        return VocabRows(self.file.path, self.name, self.storage, shape, self.read, encode)

    @property
    def rounding(self) -> str:
        """The dtype of the rows passed to ``encode``: float32 for a quantised matrix, else the dtype of the matrix."""
        return "F32" if self.blocks or self.scaled else self.tensors[0].dtype

    def encode(self, rows: Array) -> list[Array]:
        """Encode ``rows``, and return a uint8 array (len(rows), bytes per row) for each tensor of ``tensors``.

        Raises BadInput or NotExpressible if the storage format cannot represent a value of ``rows``.
        """
        wide = cast(rows, "F32")
        if self.scaled:
            return [_as_bytes(self.scaled.encode(wide))]
        if self.blocks is None:
            return [_as_bytes(cast(wide, self.tensors[0].dtype))]
        encoded = [self.blocks.codes(wide), self.blocks.scales(wide, self.tensors[1].dtype)]
        if not self.blocks.symmetric:
            encoded.append(self.blocks.zero_points(wide))
        return [_as_bytes(array) for array in encoded]

    def read(self, token_id: int) -> Array:
        """Return the bytes that all ``tensors`` store for one token, concatenated to a uint8 array (1, bytes)."""
        return self.file.token_bytes(self.name, token_id, token_id + 1)

    def values(self, token_id: int) -> Array:
        """Return the matrix values of one token as a float32 array (hidden size,)."""
        raw = self.read(token_id)[0]
        if self.scaled:
            return self.scaled.decode(raw.view(DTYPES[self.tensors[0].dtype]))
        if self.blocks is None:
            return cast(raw.view(DTYPES[self.tensors[0].dtype]), "F32")
        ends = np.cumsum([tensor.nbytes // self.n_tokens for tensor in self.tensors])
        codes, scales, *zeros = np.split(raw, ends[:-1])
        wide = cast(np.ascontiguousarray(scales).view(DTYPES[self.tensors[1].dtype]), "F32")
        middle = self._unpack(zeros[0])[: len(wide)] if zeros else np.float32(1 << (self.blocks.bits - 1))
        numbers: Array = self._unpack(codes).reshape(len(wide), -1)
        values: Array = (numbers - np.reshape(middle, (-1, 1))) * wide[:, None]
        return values.reshape(-1)

    def _unpack(self, packed: Array) -> Array:
        assert self.blocks is not None
        if self.blocks.bits == 8:
            return packed.astype(np.float32)
        pairs: Array = np.stack([packed & 15, packed >> 4], axis=-1)
        return pairs.reshape(-1).astype(np.float32)

    @cached_property
    def _n_blocks(self) -> int:
        assert self.blocks is not None
        return self.hidden // self.blocks.size

    def _check(self) -> None:
        where, main = f"{self.file.path}: {self.name}", self.tensors[0]
        if self.blocks is None:
            if (main.dtype not in FLOATS and not self.scaled) or len(main.shape) != 2:
                raise refusal(
                    where, f"expected a float or 8-bit matrix, found a {main.dtype} tensor of shape {list(main.shape)}"
                )
            return
        per_token = [self.hidden * self.blocks.bits // 8, self._n_blocks * DTYPES[self.tensors[1].dtype].itemsize]
        per_token.append(-(-self._n_blocks * self.blocks.bits // 8))
        for tensor, nbytes in zip(self.tensors, per_token, strict=False):
            if tensor.nbytes != nbytes * self.n_tokens:
                raise refusal(
                    where,
                    f"{tensor.name}: expected {nbytes} bytes per token for blocks of {self.blocks.size} values, "
                    f"found {tensor.nbytes} bytes for {self.n_tokens} tokens",
                )


def repeats(embedding: VocabMatrix, head: VocabMatrix, *, tied: object) -> bool:
    """Whether the stored LM head is a second copy of the embedding.

    For a model that ties embedding and LM head, many ONNX exporters store the matrix twice.

    tied: value of ``tie_word_embeddings`` in config.json. If ``tied`` is False, the function returns False without
    comparing values. If ``tied`` is True or missing, sample rows of embedding and LM head are compared with a
    tolerance, because the two copies may be quantised differently.
    """
    if tied is False or (embedding.n_tokens, embedding.hidden) != (head.n_tokens, head.hidden):
        return False
    return all(_near(embedding.values(row), head.values(row)) for row in sample(embedding.n_tokens))


def _near(left: Array, right: Array) -> bool:
    norm = max(float(np.linalg.norm(left)), float(np.linalg.norm(right)))
    return float(np.linalg.norm(left - right)) <= _SAME_WITHIN_NORMS * norm


def _blocks_of(file: OnnxFile, name: str) -> Blocks | None:
    form = file.blocks.get(name)
    if form is None:
        return None
    codes, scales, *zeros = file.stored_tensors(name)
    whole = form.bits in (4, 8) and form.size > 0 and not codes.nbytes * 8 // form.bits % form.size
    if not whole or codes.dtype != "U8" or scales.dtype not in FLOATS or any(part.dtype != "U8" for part in zeros):
        dtypes = ", ".join(part.dtype for part in (codes, scales, *zeros))
        reason = f"blocks of {form.size} integers with {form.bits} bits, stored as {dtypes}, are not supported"
        raise refusal(f"{file.path}: {name}", reason)
    return Blocks(form.bits, symmetric=not zeros, size=form.size)


def _as_bytes(value: Array) -> Array:
    return np.ascontiguousarray(value).reshape(len(value), -1).view(np.uint8)
